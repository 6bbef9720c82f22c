"""When the first tokens of a prefill are sent."""

from __future__ import annotations

from sglang_vericache.hooks import Hook

# Requests of a batch with which they are sent before its step is launched. With more of them the
# device would wait for the host too often.
MOST_REQUESTS = 2


def is_disable_overlap_for_batch(original, scheduler, batch, last_batch) -> bool:
    """SGLang launches the next step first, which takes longer when it drafts and verifies."""
    if original(scheduler, batch, last_batch):
        return True
    return bool(
        batch
        and batch.forward_mode.is_decode()
        and last_batch
        and last_batch.forward_mode.is_extend()
        and len(batch.reqs) <= MOST_REQUESTS
        and not scheduler.require_mlp_sync
        and scheduler.result_queue
    )


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.is_disable_overlap_for_batch",
        "around",
        is_disable_overlap_for_batch,
        "a lone request's first token waits until the step after it is launched",
        "0016-first-tokens-first.patch",
        "sglang.srt.managers.scheduler.Scheduler.FIRST_TOKEN_SYNC_MAX_BS",
    ),
)
