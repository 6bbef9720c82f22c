"""How large the draft pool and its rows are."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from sglang_vericache.compressors.budget import ALWAYS_KEPT_TOKENS, Budget
from sglang_vericache.config import VeriCacheConfig, VeriCacheConfigError
from sglang_vericache.kernels.pool_format import create_format
from sglang_vericache.pool.draft_pool import DraftPool
from sglang_vericache.pool.rows import DraftRows

logger = logging.getLogger(__name__)


# Rows may take so much that views can grow to whole contexts: 4 bytes a token and request.
ROOM_TO_GROW_BYTES = 128 << 20
# Of an automatic size with offloading: at most this part of the main pool's bytes, which is a
# quarter of what both pools have together.
MOST_OF_MAIN = 1 / 3


@dataclass(frozen=True)
class HostTier:
    """What decides how many requests can run beside those that the main pool holds.

    Attributes:
        host_bytes: that the host pool can have.
        host_ratio: of the main pool's size, which the host pool does not exceed; None: it may.
        weight_bytes: of the model, as a draft step reads them.
    """

    host_bytes: int
    host_ratio: float | None
    weight_bytes: int

    def running_tokens(self, main_tokens: int, main_row_bytes: int) -> int:
        """Full KV, in tokens, of the requests that can usefully run.

        What the main pool holds, and what the link can bring in a round: more would only wait. A
        round of 15 draft steps and a verify reads the weights W 16 times and the attached full KV
        A about four times (a fifth of it 15 times, then all). A link is about 1/60 as fast as
        device memory (PCIe 5 x16 at 55 GB/s against 3.3 to 4.8 TB/s), so meanwhile it brings
        (16 W + 4 A) / 60, roughly W / 4 + A / 16. Nobody leaves without a copy in the host pool.
        """
        link = main_tokens // 16 + self.weight_bytes // 4 // main_row_bytes
        host = self.host_bytes // main_row_bytes
        if self.host_ratio is not None:
            host = min(host, int(self.host_ratio * main_tokens))
        return max(main_tokens, min(main_tokens + link, host))


@dataclass(frozen=True)
class DraftSize:
    """
    Attributes:
        slots: of the draft pool.
        wanted: that would serve all requests that can run.
    """

    slots: int
    wanted: int


def draft_size(
    config: VeriCacheConfig,
    main_tokens: int,
    max_requests: int,
    main_row_bytes: int,
    draft_row_bytes: int,
    tier: HostTier | None = None,
) -> DraftSize:
    """Of the pool beside a main pool of that size, where no memory was given by hand.

    With a host tier more requests run than the main pool holds; for them the draft pool gets up to
    MOST_OF_MAIN. It depends on nothing but the main pool's size, so that what is reserved before
    that pool is built and what is built beside it agree; where SGLang clamps the main pool
    afterwards (--max-total-tokens) both shrink, and what is left stays free.
    """
    attached = automatic_slots(config, main_tokens, max_requests)
    if tier is None:
        return DraftSize(attached, attached)
    running = tier.running_tokens(main_tokens, main_row_bytes)
    wanted = max(automatic_slots(config, running, max_requests), attached)
    most = int(MOST_OF_MAIN * main_tokens * main_row_bytes) // draft_row_bytes
    return DraftSize(min(wanted, max(most, attached)), wanted)


def automatic_slots(config: VeriCacheConfig, running_tokens: int, max_requests: int) -> int:
    """Slots for as many drafting requests as have so many tokens together.

    Spans take their share of these; each request that is long enough to draft takes a tail, but
    many short ones no more than a quarter of the tokens together. No more than another quarter is
    for what short contexts keep beyond their share (--vericache-keep-min): a main pool full of
    them would want a draft pool of its own size, which long contexts would pay for. Those that
    find no room for it then keep their share alone, which is provided for as if there were no
    least number (ViewKeeper chooses).
    """
    budget, by_share = Budget.of(config), Budget.of(config).without_floor
    requests = max(1, min(max_requests, running_tokens // config.min_context_tokens))
    each = running_tokens // requests
    spans = by_share.path_rows(each) * requests
    beyond = budget.path_rows(each) * requests - spans
    tails = min(requests * config.tail_capacity, running_tokens // 4)
    return max(spans + min(beyond, running_tokens // 4) + tails, least_slots(config))


def least_slots(config: VeriCacheConfig) -> int:
    """Slots that one request of the shortest drafting context needs."""
    budget = Budget.of(config).without_floor
    return budget.path_rows(config.min_context_tokens) + config.tail_capacity


def draft_share_bytes(
    config: VeriCacheConfig,
    budget_bytes: int,
    main_row_bytes: int,
    draft_row_bytes: int,
    tier: HostTier | None = None,
) -> int:
    """What the draft pool takes of a KV budget that both pools share.

    The main pool is as large as leaves room for the draft pool that it then wants.

    Args:
        main_row_bytes, draft_row_bytes: bytes of one token in each pool, all layers and heads.
    """
    if config.draft_memory_bytes is not None:
        return min(config.draft_memory_bytes, budget_bytes)
    low, high = 0, budget_bytes // main_row_bytes
    while low < high:
        tokens = (low + high + 1) // 2
        size = draft_size(config, tokens, tokens, main_row_bytes, draft_row_bytes, tier)
        if tokens * main_row_bytes + size.slots * draft_row_bytes <= budget_bytes:
            low = tokens
        else:
            high = tokens - 1
    return budget_bytes - low * main_row_bytes


def create_pool(
    config: VeriCacheConfig, main_pool: Any, max_requests: int, tier: HostTier | None = None
) -> DraftPool:
    """The draft pool beside ``main_pool`` (SGLang's KVCache of the target model).

    Raises:
        VeriCacheConfigError: the memory given is too small for one request.
    """
    keys = main_pool.get_key_buffer(main_pool.start_layer)
    _, heads, head_dim = keys.shape
    layers = main_pool.layer_num
    pool_format = create_format(config.draft_dtype, keys.dtype, head_dim)
    row_bytes = layers * heads * pool_format.row_bytes(head_dim)
    if config.draft_memory_bytes is None:
        slots = _automatic(config, main_pool, max_requests, row_bytes, tier)
    else:
        slots = config.draft_memory_bytes // row_bytes
    least = least_slots(config)
    if slots < least:
        raise VeriCacheConfigError(
            f"--vericache-draft-memory is too small for one request: {slots} tokens, but a context "
            f"of {config.min_context_tokens} tokens (--vericache-min-context) needs {least}, "
            f"{least * row_bytes / (1 << 20):.1f} MiB."
        )
    pool = DraftPool(pool_format, layers, slots, heads, head_dim, keys.device)
    logger.info(
        "Draft KV pool: %d tokens, %.2f GiB (%s).",
        slots,
        slots * row_bytes / (1 << 30),
        pool_format.name,
    )
    return pool


def _automatic(
    config: VeriCacheConfig,
    main_pool: Any,
    max_requests: int,
    row_bytes: int,
    tier: HostTier | None,
) -> int:
    main_row = main_row_bytes(main_pool)
    size = draft_size(config, main_pool.size, max_requests, main_row, row_bytes, tier)
    if size.slots < size.wanted:
        logger.info(
            "Draft KV pool: %d tokens would serve all requests that can run while others' full KV "
            "is in host memory; it gets %d, because more than a quarter of the KV memory is not "
            "taken for them. --vericache-draft-memory gives it more; a lower "
            "--vericache-keep-ratio, or --vericache-draft-dtype int4, makes it hold more requests.",
            *(size.wanted, size.slots),
        )
    return size.slots


def main_row_bytes(main_pool: Any) -> int:
    """Bytes of one token in SGLang's KVCache, over all layers and kv heads."""
    layers = range(main_pool.start_layer, main_pool.start_layer + main_pool.layer_num)
    buffers = [
        get(n) for n in layers for get in (main_pool.get_key_buffer, main_pool.get_value_buffer)
    ]
    return sum(buffer[0].numel() * buffer.element_size() for buffer in buffers)


def create_rows(config: VeriCacheConfig, main_table: torch.Tensor) -> DraftRows:
    """Rows wide enough for the longest context that ``main_table`` ``[R, W]`` can hold; where views
    grow, for all of it if that takes little memory."""
    rows, longest = main_table.shape
    width = Budget.of(config).folded_limit_rows(longest) + config.tail_capacity
    if config.views_grow:
        whole = longest + ALWAYS_KEPT_TOKENS + config.tail_capacity
        width = max(width, min(whole, ROOM_TO_GROW_BYTES // (4 * rows)))
    return DraftRows(rows, width, main_table.device)
