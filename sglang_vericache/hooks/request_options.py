"""Options of one request: from the client to the scheduler, and refused in time."""

from __future__ import annotations

from sglang_vericache.flags import config_of
from sglang_vericache.hooks import Hook
from sglang_vericache.request_options import KEY, check_room, read_options

PATCH = "0010-request-options.patch"


def check_tokenized(result, manager, *args, **kwargs) -> None:
    """Every front end's requests come by here, with preferred sampling parameters merged in, and
    a ValueError is answered with HTTP 400 before the scheduler hears of the request."""
    check_request(result.sampling_params, len(result.input_ids or ()), manager)


def check_request(sampling_params, num_input_tokens: int, manager) -> None:
    config = config_of(manager.server_args)
    options = read_options(sampling_params.custom_params, config)
    check_room(options, config, num_input_tokens, manager.context_len)


def take_openai_field(original, values):
    """The first look at the body of a chat, completion or responses request, still a dict: moves
    the field where SGLang takes it along to the sampling parameters."""
    values = original(values)
    if not isinstance(values, dict) or KEY not in values:
        return values
    if "input" in values and not {"messages", "prompt"} & values.keys():
        raise ValueError(
            f"{KEY} is not accepted by /v1/responses: use /v1/chat/completions or /v1/completions."
        )
    params = values.get("custom_params") or {}
    if not isinstance(params, dict):
        return values  # SGLang refuses the request
    if KEY in params:
        raise ValueError(f"{KEY} is given twice: as a field and in custom_params.")
    rest = {name: value for name, value in values.items() if name != KEY}
    return rest | {"custom_params": params | {KEY: values[KEY]}}


def register() -> None:
    """Let the patch take the field."""
    from sglang.srt.entrypoints.openai import protocol

    protocol.register_custom_param_field(KEY)


HOOKS = (
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        "after",
        check_tokenized,
        "a plugin cannot validate its custom_params, and the scheduler cannot answer HTTP 400",
        PATCH,
        "sglang.srt.speculative.spec_registry.CustomSpecAlgo.validate_request",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.protocol._migrate_deprecated_dp_rank",
        "around",
        take_openai_field,
        "OpenAI requests drop fields that they do not declare",
        PATCH,
        "sglang.srt.entrypoints.openai.protocol.register_custom_param_field",
        register,
    ),
)
