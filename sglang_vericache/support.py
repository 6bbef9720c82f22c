"""What drafting cannot serve: a sentence for a server, a reason for a request."""

from __future__ import annotations

from typing import Any

import torch

from sglang_vericache.flags import ALGORITHM
from sglang_vericache.request_options import RequestOptions

# Response fields and metrics use these words for tokens that were decoded plainly.
SHORT_CONTEXT = "short_context"
NO_DRAFT_MEMORY = "no_draft_memory"
END_OF_OUTPUT = "end_of_output"
AWAITS_VIEW = "awaits_view"
AWAITS_CHECKPOINT = "awaits_checkpoint"
AWAITS_FULL_KV = "awaits_full_kv"
ENDED = "ended"
DISABLED_BY_REQUEST = "disabled_by_request"
SWITCHED_OFF = "switched_off"
PLAIN_IS_FASTER = "plain_is_faster"
SAMPLING = "sampling"


# Attributes of SGLang's ServerArgs, what is accepted of each, and the flag.
ACCEPTED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("page_size", (None, 1), "--page-size"),
    ("tp_size", (1,), "--tp-size"),
    ("pp_size", (1,), "--pp-size"),
    ("dp_size", (1,), "--dp-size"),
    ("dcp_size", (1,), "--dcp-size"),
    ("disaggregation_mode", ("null",), "--disaggregation-mode"),
    ("radix_cache_backend", (None, "vericache"), "--radix-cache-backend"),
    ("kv_cache_dtype", ("auto", "bfloat16", "bf16"), "--kv-cache-dtype"),
    ("uno_lora_path", (None,), "--uno-lora-path"),
    ("speculative_algorithm", (ALGORITHM,), "--speculative-algorithm"),
    ("hicache_storage_backend", (None,), "--hicache-storage-backend"),
    ("hicache_host_memory_mode", (None, "cache"), "--hicache-host-memory-mode"),
)
# Switches that have to stay off.
EXCLUDED = (
    ("enable_mixed_chunk", "--enable-mixed-chunk"),
    ("is_embedding", "--is-embedding"),
    ("enable_dp_attention", "--enable-dp-attention"),
    ("enable_two_batch_overlap", "--enable-two-batch-overlap"),
    ("enable_pdmux", "--enable-pdmux"),
    ("enable_lmcache", "--enable-lmcache"),
    ("enable_mis", "--enable-mis"),
    ("enable_flexkv", "--enable-flexkv"),
    ("enable_hisparse", "--enable-hisparse"),
    ("enable_unified_memory", "--enable-unified-memory"),
    ("enable_unified_cache_external_linker", "--enable-unified-cache-external-linker"),
    ("enable_return_routed_experts", "--enable-return-routed-experts"),
    ("speculative_adaptive", "--speculative-adaptive"),
)


def accepted_words(attribute: str, accepted: tuple[Any, ...]) -> str:
    if attribute == "speculative_algorithm":
        return "no other"
    return " or ".join("unset" if value is None else str(value) for value in accepted)


def validate_server(settings: Any) -> str | None:
    """Why ``--enable-vericache`` cannot run with these server settings, or None.

    Args:
        settings: resolved ServerArgs, or anything with its attributes.
    """
    for attribute, accepted, flag in ACCEPTED:
        value = getattr(settings, attribute, accepted[0])
        if value not in accepted:
            return (
                f"--enable-vericache does not work with {flag} {value}: "
                f"it accepts {accepted_words(attribute, accepted)}."
            )
    for attribute, flag in EXCLUDED:
        if getattr(settings, attribute, False):
            return f"--enable-vericache does not work with {flag}: leave that flag out."
    return None


def validate_model(model_config: Any) -> str | None:
    """Why drafting does not fit this model, or None.

    Args:
        model_config: SGLang's ModelConfig, or anything with its attributes.
    """
    name = getattr(model_config, "model_path", "this model")
    text = getattr(model_config, "hf_text_config", None)
    window = getattr(model_config, "sliding_window_size", None)
    uses_window = window not in (None, -1) and getattr(text, "use_sliding_window", True)
    state_space = any(
        getattr(text, attribute, None)
        for attribute in ("mamba_d_state", "ssm_cfg", "linear_num_value_heads", "state_size")
    )
    for found, what in (
        (not getattr(model_config, "is_generation", True), "is an embedding or reward model"),
        (getattr(model_config, "is_encoder_decoder", False), "is an encoder-decoder model"),
        (getattr(model_config, "is_multimodal", False), "is a multimodal model"),
        (getattr(model_config.attention_arch, "name", "") == "MLA", "has MLA attention"),
        (
            getattr(model_config.attention_arch, "name", "") == "SSM" or state_space,
            "has Mamba or linear-attention layers",
        ),
        (
            getattr(model_config, "is_hybrid_swa", False) or uses_window,
            "has sliding-window attention",
        ),
    ):
        if found:
            return (
                f"--enable-vericache does not support {name}: it {what}. Supported are "
                "text-generation models whose layers all have full multi-head or grouped-query "
                "attention."
            )
    return None


def validate_layers(model: torch.nn.Module, kv_dtype: torch.dtype) -> str | None:
    """The same question asked of the loaded layers, for what a config does not tell.

    Args:
        kv_dtype: of the main pool: with `--kv-cache-dtype auto` a checkpoint decides.
    """
    if kv_dtype.itemsize < 2:
        return (
            f"--enable-vericache does not support keys and values in {kv_dtype}, which this "
            "checkpoint asks for: --kv-cache-dtype accepts bfloat16."
        )
    for module in model.modules():
        window = getattr(module, "sliding_window_size", None)
        if type(module).__name__ == "RadixAttention" and window not in (None, -1):
            return (
                f"--enable-vericache does not support this model: layer {module.layer_id} has "
                f"a sliding window of {window} tokens."
            )
    return None


def draft_obstacle(req: Any, options: RequestOptions) -> str | None:
    """What a request asks for that is not exact with drafting, or None.

    Such a request is decoded plainly, in the same batch as those that draft.

    Args:
        req: SGLang's Req.
    """
    if not options.enabled:
        return DISABLED_BY_REQUEST
    return SAMPLING if req.sampling_params.top_k > 1 else _extra_of(req)


def is_token_by_token(req: Any) -> bool:
    """Whether the host has to see each token of a request before the next one is computed, or
    returns more than tokens. Sampling alone needs neither."""
    return _extra_of(req) is not None


def _extra_of(req: Any) -> str | None:
    params = req.sampling_params
    for found, reason in (
        (req.grammar is not None, "grammar"),
        (_has_penalty(params), "penalty"),
        (params.logit_bias is not None, "logit_bias"),
        (req.custom_logit_processor is not None, "custom_logit_processor"),
        (req.return_logprob, "logprob"),
        (bool(req.return_hidden_states), "hidden_states"),
        (req.return_sampling_mask, "sampling_mask"),
        (req.lora_id is not None, "lora"),
        (req.multimodal_inputs is not None, "multimodal"),
        (req.input_embeds is not None, "input_embeds"),
        (req.beam_group is not None, "beam_search"),
        (req.session is not None, "session"),
    ):
        if found:
            return reason
    return None


def _has_penalty(params: Any) -> bool:
    return (
        params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.repetition_penalty != 1.0
        or params.min_new_tokens > 0
    )
