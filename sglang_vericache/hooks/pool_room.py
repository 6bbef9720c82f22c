"""Who is admitted and when, and who goes on, where detached requests count as free room."""

from __future__ import annotations

from sglang_vericache.hooks import Hook

PATCH = "0015-cache-has-a-say-in-admission.patch"
ADDED = "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.may_admit"


def add_one_req(original, adder, req, has_chunked_req, truncation_align_size):
    """SGLang counts the tokens of detached requests as free, but each of them must be attached
    again; and a request that it refuses for want of room may fit once others are detached. Where
    one fits, several may soon, and share a prefill; their prompts come meanwhile."""
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult

    cache = adder.tree_cache
    if not hasattr(cache, "may_admit"):
        return original(adder, req, has_chunked_req, truncation_align_size)
    most = req.sampling_params.max_new_tokens - len(req.output_ids)
    growth = min(max(most, 0), CLIP_MAX_NEW_TOKENS)
    remaining = int(adder.rem_total_tokens)
    alone = not (adder.can_run_list or adder.preempt_list or has_chunked_req)
    waiting = adder.waiting_queue_len if alone else 0
    if not cache.may_admit(req, remaining, growth, waiting):
        # The scheduler's loop ends with the first refusal, but for this answer.
        return AddReqResult.CONTINUE if cache.looks_on() else AddReqResult.OTHER
    result = original(adder, req, has_chunked_req, truncation_align_size)
    if result != AddReqResult.NO_TOKEN:
        return result
    needed = len(req.full_untruncated_fill_ids) + growth + adder.per_req_token_overhead
    if cache.on_refusal(0 if req in adder.can_run_list else needed - remaining):
        # NO_TOKEN would close admission until a request leaves.
        return AddReqResult.OTHER
    return result


def check_decode_mem(original, batch, selected_indices=None) -> bool:
    """SGLang's check is content while evictable tokens last."""
    if not original(batch, selected_indices):
        return False
    if getattr(batch.tree_cache, "rotation", None) is None:
        return True
    indices = range(len(batch.reqs)) if selected_indices is None else selected_indices
    return batch.tree_cache.may_decode([batch.reqs[i] for i in indices])


HOOKS = (
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        "around",
        add_one_req,
        "requests are admitted until none of them can be attached any more, and none is admitted "
        "after the first refusal, whatever is detached; and each is prefilled alone",
        PATCH,
        ADDED,
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.check_decode_mem",
        "around",
        check_decode_mem,
        "nobody is retracted when the tails have taken the room that a fetch needs",
        PATCH,
        ADDED,
    ),
)
