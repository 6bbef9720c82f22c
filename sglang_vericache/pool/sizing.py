"""How large the draft pool and its rows are."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.config import VeriCacheConfig, VeriCacheConfigError
from sglang_vericache.kernels.pool_format import create_format
from sglang_vericache.pool.draft_pool import DraftPool
from sglang_vericache.pool.rows import DraftRows

logger = logging.getLogger(__name__)


def automatic_slots(config: VeriCacheConfig, main_tokens: int, max_requests: int) -> int:
    """Slots for as many drafting requests as the main pool holds.

    Spans take their share of the main pool's tokens; each request that is long enough to draft
    takes a tail, but many short ones no more than a quarter of the main pool together.
    """
    budget = Budget.of(config)
    requests = max(1, min(max_requests, main_tokens // config.min_context_tokens))
    spans = budget.path_rows(main_tokens // requests) * requests
    tails = min(requests * config.tail_capacity, main_tokens // 4)
    return max(spans + tails, least_slots(config))


def least_slots(config: VeriCacheConfig) -> int:
    """Slots that one request of the shortest drafting context needs."""
    return Budget.of(config).path_rows(config.min_context_tokens) + config.tail_capacity


def draft_share_bytes(
    config: VeriCacheConfig, budget_bytes: int, main_row_bytes: int, draft_row_bytes: int
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
        slots = automatic_slots(config, tokens, tokens)
        if tokens * main_row_bytes + slots * draft_row_bytes <= budget_bytes:
            low = tokens
        else:
            high = tokens - 1
    return budget_bytes - low * main_row_bytes


def create_pool(config: VeriCacheConfig, main_pool: Any, max_requests: int) -> DraftPool:
    """The draft pool beside ``main_pool`` (SGLang's KVCache of the target model).

    Raises:
        VeriCacheConfigError: the memory given is too small for one request.
    """
    keys = main_pool.get_key_buffer(main_pool.start_layer)
    _, heads, head_dim = keys.shape
    layers = main_pool.layer_num
    pool_format = create_format(config.draft_dtype, keys.dtype)
    row_bytes = layers * heads * pool_format.row_bytes(head_dim)
    if config.draft_memory_bytes is None:
        slots = automatic_slots(config, main_pool.size, max_requests)
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


def main_row_bytes(main_pool: Any) -> int:
    """Bytes of one token in SGLang's KVCache, over all layers and kv heads."""
    layers = range(main_pool.start_layer, main_pool.start_layer + main_pool.layer_num)
    buffers = [
        get(n) for n in layers for get in (main_pool.get_key_buffer, main_pool.get_value_buffer)
    ]
    return sum(buffer[0].numel() * buffer.element_size() for buffer in buffers)


def create_rows(config: VeriCacheConfig, main_table: torch.Tensor) -> DraftRows:
    """Rows wide enough for the longest context that ``main_table`` ``[R, W]`` can hold."""
    rows, longest = main_table.shape
    width = Budget.of(config).limit_rows(longest) + config.tail_capacity
    return DraftRows(rows, width, main_table.device)
