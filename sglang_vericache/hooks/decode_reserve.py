"""Slots that a decode step reserves."""

from __future__ import annotations

from sglang_vericache.flags import ALGORITHM
from sglang_vericache.hooks import Hook


def get_algorithm() -> str | None:
    from sglang.srt.runtime_context import get_spec

    return get_spec().speculative_algorithm


def reserve_per_decode(original) -> int:
    """One verify pass without overlap scheduling. SGLang always reserves two, because under
    overlap the committed length that it knows lags by one step."""
    from sglang.srt.runtime_context import get_schedule, get_spec

    if get_algorithm() == ALGORITHM and get_schedule().disable_overlap_schedule:
        return get_spec().speculative_num_draft_tokens
    return original()


def extra_context(original) -> int:
    """Width of a request's row beyond the context length: the whole reserve must fit."""
    extra = original()
    if get_algorithm() != ALGORITHM:
        return extra
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    return max(extra, get_alloc_reserve_per_decode())


PATCH = "0004-decode-reserve.patch"
# With the patch, reserve and row width follow from it for every algorithm.
ADDED = "sglang.srt.mem_cache.allocation_sizing.get_num_unsettled_decode_steps"

HOOKS = (
    Hook(
        "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len",
        "around",
        extra_context,
        "a request near the context limit writes its reserve past the end of its row",
        PATCH,
        ADDED,
    ),
    Hook(
        "sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode",
        "around",
        reserve_per_decode,
        "without overlap scheduling half of the reserve is never used",
        PATCH,
        ADDED,
    ),
)
