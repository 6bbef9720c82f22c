"""Per-request counters in ``meta_info``."""

from __future__ import annotations

from sglang_vericache.hooks import Hook


def update_request_meta_info(
    original, manager, meta_info, state, customized_info, index, finish_reason
) -> None:
    """SGLang concatenates the values of a key over a response's chunks into a list; ours is one
    record that comes with the last chunk."""
    from sglang_vericache.output_streamer import RESPONSE_FIELD

    others = {key: values for key, values in customized_info.items() if key != RESPONSE_FIELD}
    original(manager, meta_info, state, others, index, finish_reason)
    values = customized_info.get(RESPONSE_FIELD)
    if values is not None and values[index]:
        meta_info[RESPONSE_FIELD] = values[index][-1]


HOOKS = (
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        "around",
        update_request_meta_info,
        "a request-level value arrives as a list of one",
        "0006-request-level-info.patch",
        "sglang.srt.managers.io_struct.RequestLevelInfo",
    ),
)
