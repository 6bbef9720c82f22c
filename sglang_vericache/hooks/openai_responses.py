"""Per-request counters in OpenAI responses."""

from __future__ import annotations

from sglang_vericache.hooks import Hook

PATCH = "0014-openai-request-level-info.patch"
ADDED = "sglang.srt.entrypoints.openai.protocol.register_sglext_key"


def extend_response(original, serving, request, ret, created):
    from sglang_vericache import openai_fields

    return openai_fields.extend_response(original(serving, request, ret, created), ret)


def extend_stream(original, serving, adapted_request, request, raw_request):
    from sglang_vericache import openai_fields

    return openai_fields.extend_stream(original, serving, adapted_request, request, raw_request)


def register() -> None:
    """Let the patch show the counters."""
    from sglang.srt.entrypoints.openai import protocol

    from sglang_vericache.output_streamer import RESPONSE_FIELD

    protocol.register_sglext_key(RESPONSE_FIELD)


_OPENAI = "sglang.srt.entrypoints.openai"
_REASON = "OpenAI responses show only the request-level values that SGLang itself declares"
HOOKS = (
    Hook(
        f"{_OPENAI}.serving_chat.OpenAIServingChat._build_chat_response",
        "around",
        extend_response,
        _REASON,
        PATCH,
        ADDED,
        register,
    ),
    Hook(
        f"{_OPENAI}.serving_completions.OpenAIServingCompletion._build_completion_response",
        "around",
        extend_response,
        _REASON,
        PATCH,
        ADDED,
        register,
    ),
    Hook(
        f"{_OPENAI}.serving_chat.OpenAIServingChat._generate_chat_stream",
        "around",
        extend_stream,
        _REASON,
        PATCH,
        ADDED,
        register,
    ),
    Hook(
        f"{_OPENAI}.serving_completions.OpenAIServingCompletion._generate_completion_stream",
        "around",
        extend_stream,
        _REASON,
        PATCH,
        ADDED,
        register,
    ),
)
