"""Slots that a decode step reserves."""

from __future__ import annotations

from sglang_vericache.flags import ALGORITHM
from sglang_vericache.hooks import Hook


def reserve_per_decode(original) -> int:
    """One verify pass. SGLang reserves two, because under overlap scheduling the committed length
    that it knows lags by one step; it also writes them into a row that is widened by one pass
    only, past its end for a request near the context limit."""
    from sglang.srt.runtime_context import get_schedule, get_spec

    if get_spec().speculative_algorithm == ALGORITHM and get_schedule().disable_overlap_schedule:
        return get_spec().speculative_num_draft_tokens
    return original()


HOOKS = (
    Hook(
        "sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode",
        "around",
        reserve_per_decode,
        "without overlap half of the reserve is never used, and it overruns the request's row",
        "0004-decode-reserve.patch",
        "sglang.srt.mem_cache.allocation_sizing.get_num_unsettled_decode_steps",
    ),
)
