"""How large the draft pool and its rows are, beside a main pool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.config import VeriCacheConfig, VeriCacheConfigError
from sglang_vericache.pool import sizing
from sglang_vericache.pool.sizing import (
    HostTier,
    automatic_slots,
    create_pool,
    create_rows,
    draft_share_bytes,
    draft_size,
    least_slots,
)

LAYERS, HEADS, DIM = 3, 2, 8
# Key and value of one token in float32.
ROW_BYTES = LAYERS * HEADS * DIM * 2 * 4


def main_pool(tokens: int = 4000, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    keys = torch.zeros(tokens + 1, HEADS, DIM, dtype=dtype)
    return SimpleNamespace(
        size=tokens,
        start_layer=0,
        layer_num=LAYERS,
        get_key_buffer=lambda layer: keys,
        get_value_buffer=lambda layer: keys,
    )


def config(**fields) -> VeriCacheConfig:
    """By the ratio alone where a test does not say otherwise."""
    defaults = {"min_context_tokens": 100, "horizon": 3, "keep_min_tokens": 0}
    return VeriCacheConfig(**(defaults | fields))


def test_least_is_one_request():
    """Catches a tail that is forgotten: 68 tokens of a 100-token path, then 256 + 2 x 4."""
    assert least_slots(config()) == 68 + 264


@pytest.mark.parametrize(
    ("tokens", "max_requests", "slots"),
    [
        pytest.param(10_000, 5, 5 * 400 + 5 * 264, id="five-long-ones"),
        pytest.param(10_000, 50, 50 * 68 + 2500, id="tails-of-many-are-capped"),
        pytest.param(1000, 50, 10 * 68 + 250, id="no-more-than-are-long-enough"),
        pytest.param(300, 50, 332, id="at-least-one"),
    ],
)
def test_automatic_size_by_hand(tokens, max_requests, slots):
    """Catches spans of the whole main pool's tokens as if they were one path, and tails that
    take more than a quarter of it."""
    assert automatic_slots(config(), tokens, max_requests) == slots


@pytest.mark.parametrize("max_requests", [1, 2, 7, 1000])
@pytest.mark.parametrize("tokens", [1, 100, 4000, 100_000])
@pytest.mark.parametrize(
    "budget", [{}, {"keep_ratio": None, "keep_tokens": 500}, {"keep_ratio": 1.0}], ids=str
)
def test_automatic_size_serves_a_full_main_pool(tokens, max_requests, budget):
    """Catches a pool too small for one request, or for the spans of requests that fill the main
    pool; and one that is larger than the main pool it is meant to relieve."""
    settings = config(**budget)
    slots = automatic_slots(settings, tokens, max_requests)
    assert slots >= least_slots(settings)
    requests = max(1, min(max_requests, tokens // settings.min_context_tokens))
    assert slots >= requests * Budget.of(settings).path_rows(tokens // requests)
    assert slots <= max(tokens + tokens // 4, least_slots(settings))


@pytest.mark.parametrize(
    ("tokens", "max_requests", "slots"),
    [
        pytest.param(100_000, 20, 20 * 1000 + 20 * 264, id="long-ones-by-the-ratio"),
        pytest.param(12_000, 10, 10 * 300 + 10 * 264, id="some-beyond-their-share"),
        pytest.param(10_000, 50, 50 * 68 + 2500 + 2500, id="no-more-than-a-quarter-beyond"),
    ],
)
def test_automatic_size_with_a_floor_by_hand(tokens, max_requests, slots):
    """Catches a pool for the ratio alone, too tight for many short contexts, and one as large as
    the main pool, for which long contexts would pay."""
    assert automatic_slots(config(keep_min_tokens=300), tokens, max_requests) == slots


@pytest.mark.parametrize("max_requests", [1, 7, 50, 1000])
@pytest.mark.parametrize("tokens", [1, 100, 4000, 100_000])
def test_a_floor_takes_nothing_from_the_ratio(tokens, max_requests):
    """Catches a pool in which the views that keep their share alone no longer find room, and a
    draft pool given by hand that is suddenly too small to start."""
    slots = automatic_slots(config(keep_min_tokens=1024), tokens, max_requests)
    assert 0 <= slots - automatic_slots(config(), tokens, max_requests) <= tokens // 4
    assert least_slots(config(keep_min_tokens=1024)) == least_slots(config())


# With a host tier


def test_running_tokens_by_hand():
    """Mistral Small 24B beside 175,000 tokens: the link brings 73,000 a round, and a sixteenth."""
    row, weights = 163_840, 48_000_000_000
    roomy = HostTier(10**12, None, weights)
    assert roomy.running_tokens(175_000, row) == 175_000 + 10_937 + 73_242
    assert HostTier(200_000 * row, None, weights).running_tokens(175_000, row) == 200_000
    assert HostTier(100_000 * row, None, weights).running_tokens(175_000, row) == 175_000
    assert HostTier(10**12, 2.0, weights).running_tokens(40_000, row) == 80_000


def test_size_with_a_host_tier_by_hand():
    """Catches a pool for the main pool's tokens alone, and one that takes most of the memory."""
    tier = HostTier(10**9, 2.0, 10**12)
    settings = config(min_context_tokens=2000)
    # Twice 100,000 tokens in 100 requests at most: 100 times 400 rows and tails of 264.
    size = draft_size(settings, 100_000, 100, 100, 25, tier)
    assert size.slots == size.wanted == 100 * 400 + 100 * 264
    assert draft_size(settings, 100_000, 100, 100, 100, tier).slots == 100_000 // 3
    # Unless what fits takes more already.
    attached = draft_size(settings, 100_000, 100, 100, 400).slots
    assert attached == 50 * 400 + 50 * 264
    assert draft_size(settings, 100_000, 100, 100, 400, tier).slots == attached


@pytest.mark.parametrize("draft_row", [30, 100, 400])
@pytest.mark.parametrize("weights", [0, 10**6, 10**9])
@pytest.mark.parametrize("ratio", [None, 8.0])
def test_what_is_built_was_reserved(ratio, weights, draft_row):
    """Catches a draft pool that is larger than its part of the budget, whatever SGLang clamps the
    main pool to, and one that is smaller than without offloading."""
    tier, budget, row = HostTier(10**8, ratio, weights), 10**7, 100
    taken = draft_share_bytes(config(), budget, row, draft_row, tier)
    most = (budget - taken) // row
    assert taken >= draft_share_bytes(config(), budget, row, draft_row)
    for main in (most, most - 1, most - 700, most // 2, most // 10, 1000):
        slots = draft_size(config(), main, 2048, row, draft_row, tier).slots
        assert slots * draft_row <= taken
        assert slots >= automatic_slots(config(), main, 2048)


def test_memory_given_by_hand_is_not_a_matter_of_the_tier():
    tier = HostTier(10**9, 8.0, 10**9)
    settings = config(draft_memory_bytes=400 * ROW_BYTES)
    assert draft_share_bytes(settings, 10**9, 100, ROW_BYTES, tier) == 400 * ROW_BYTES
    assert create_pool(settings, main_pool(), 4, tier).slots == 400


def test_the_pool_that_is_built(caplog):
    """With what the main pool's buffers say; and a sentence where the share binds."""
    tier = HostTier(10**9, 8.0, 10**9)
    with caplog.at_level("INFO"):
        pool = create_pool(config(), main_pool(), 100, tier)
    size = draft_size(config(), 4000, 100, ROW_BYTES, ROW_BYTES, tier)
    assert pool.slots == size.slots < size.wanted
    assert "a quarter of the KV memory" in caplog.text and "--vericache-keep-ratio" in caplog.text


def test_given_memory_is_used_and_not_exceeded():
    """Catches bytes of one layer, head or part taken for all."""
    pool = create_pool(config(draft_memory_bytes=500 * ROW_BYTES + 17), main_pool(), 4)
    assert pool.slots == pool.allocator.total == 500
    used = sum(t[:, 1:].numel() * t.element_size() for t in pool.storage.tensors.values())
    assert used == 500 * ROW_BYTES


def test_just_enough_memory():
    """Catches a bound that refuses the size its own message asks for."""
    assert create_pool(config(draft_memory_bytes=332 * ROW_BYTES), main_pool(), 4).slots == 332


def test_too_little_memory_gives_a_sentence():
    """Catches a server that starts and then never drafts."""
    with pytest.raises(VeriCacheConfigError) as error:
        create_pool(config(draft_memory_bytes=331 * ROW_BYTES), main_pool(), 4)
    message = str(error.value)
    assert message.startswith("--vericache-draft-memory is too small")
    assert "331 tokens" in message and "needs 332" in message
    assert "--vericache-min-context" in message and "MiB" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pool_looks_like_the_main_one(dtype):
    """Catches a dtype or a shape that model code would not accept in the main pool's place."""
    pool = create_pool(config(), main_pool(dtype=dtype), 4)
    keys, values = pool.get_kv_buffer(2)
    assert keys.shape == values.shape == (pool.slots + 1, HEADS, DIM)
    assert keys.dtype == values.dtype == pool.dtype == dtype
    assert pool.page_size == 1
    keys[5] = 1
    assert (pool.storage.read(2, torch.tensor([5]))[0] == 1).all(), "the buffer is the storage"


@pytest.mark.parametrize(
    "budget",
    [{}, {"keep_ratio": None, "keep_tokens": 500}, {"keep_min_tokens": 1024}],
    ids=str,
)
def test_rows_hold_the_longest_context(budget):
    """Catches a row that overflows just before the context is full."""
    settings = config(**budget)
    rows = create_rows(settings, torch.zeros(6, 2000, dtype=torch.int32))
    assert rows.table.shape[0] == 6
    for committed in (1, 68, 500, 1999, 2000):
        assert rows.width >= Budget.of(settings).limit_rows(committed) + settings.tail_capacity


def test_rows_have_room_to_grow(monkeypatch):
    """Catches views that could not grow to the whole of a context, and rows that take more memory
    for it than the caches themselves."""
    table = torch.zeros(6, 2000, dtype=torch.int32)
    tail = config().tail_capacity
    assert create_rows(config(grow_views=True), table).width == 2000 + 68 + tail
    monkeypatch.setattr(sizing, "ROOM_TO_GROW_BYTES", 6 * 4 * 1000)
    assert create_rows(config(grow_views=True), table).width == 1000
    monkeypatch.setattr(sizing, "ROOM_TO_GROW_BYTES", 0)
    constant = {"keep_ratio": None, "keep_tokens": 400}
    for fixed in ({"grow_views": True}, {"grow_views": False}, constant | {"grow_views": True}):
        assert create_rows(config(**fixed), table).width == 468 + tail, "what the budget needs"
