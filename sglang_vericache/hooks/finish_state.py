"""Steps that accept nothing."""

from __future__ import annotations

from sglang_vericache.hooks import Hook


def update_finish_state(original, req, new_accepted_len: int = 1) -> None:
    """``output_ids[-0:]`` is the whole list: SGLang would check every token of the output again,
    each step. An abort still takes effect."""
    if new_accepted_len == 0 and not req.to_finish:
        return
    original(req, new_accepted_len)


HOOKS = (
    Hook(
        "sglang.srt.managers.schedule_batch.Req.update_finish_state",
        "around",
        update_finish_state,
        "a step that accepts nothing rescans the whole output",
        "0005-steps-that-accept-nothing.patch",
        "sglang.srt.managers.schedule_batch.Req.num_unsent_tokens",
    ),
)
