"""What drafting cannot serve: refused with a sentence, or decoded plainly for a reason."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plain_request import request

from sglang_vericache.request_options import RequestOptions
from sglang_vericache.support import (
    draft_obstacle,
    validate_layers,
    validate_model,
    validate_server,
)


def server(**changes) -> SimpleNamespace:
    accepted = {
        "page_size": 1,
        **dict.fromkeys(("tp_size", "pp_size", "dp_size", "dcp_size"), 1),
        "disaggregation_mode": "null",
        "kv_cache_dtype": "auto",
        "speculative_algorithm": "VERICACHE",
    }
    return SimpleNamespace(**(accepted | changes))


def test_plain_server_is_fine():
    """Catches a default of SGLang that is taken for a feature, which would refuse everyone."""
    assert validate_server(server()) is None
    assert validate_server(server(page_size=None, kv_cache_dtype="bfloat16")) is None


@pytest.mark.parametrize(
    ("attribute", "value", "flag"),
    [
        ("page_size", 16, "--page-size 16: it accepts unset or 1"),
        ("tp_size", 2, "--tp-size 2: it accepts 1"),
        ("pp_size", 2, "--pp-size 2: it accepts 1"),
        ("dp_size", 4, "--dp-size 4: it accepts 1"),
        ("disaggregation_mode", "prefill", "--disaggregation-mode prefill: it accepts null"),
        ("kv_cache_dtype", "fp8_e4m3", "--kv-cache-dtype fp8_e4m3: it accepts auto or"),
        ("radix_cache_backend", "other", "--radix-cache-backend other: it accepts unset or"),
        ("speculative_algorithm", "EAGLE", "--speculative-algorithm EAGLE: it accepts no other"),
        ("enable_mixed_chunk", True, "--enable-mixed-chunk: leave that flag out"),
        ("enable_dp_attention", True, "--enable-dp-attention: leave that flag out"),
        ("enable_mis", True, "--enable-mis: leave that flag out"),
        ("hicache_storage_backend", "file", "--hicache-storage-backend file: it accepts unset"),
        ("hicache_host_memory_mode", "buffer_only", "buffer_only: it accepts unset or cache"),
    ],
)
def test_server_setting_is_refused_by_name(attribute, value, flag):
    """Catches a setting that slips through to a server that is not exact or crashes."""
    problem = validate_server(server(**{attribute: value}))
    assert problem is not None and problem.startswith("--enable-vericache does not work with")
    assert flag in problem and problem.endswith(".")


def model(arch: str = "MHA", text: dict | None = None, **changes) -> SimpleNamespace:
    fields = {
        "model_path": "some/model",
        "attention_arch": SimpleNamespace(name=arch),
        "hf_text_config": SimpleNamespace(**(text or {})),
    }
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (model(), None),
        (model(sliding_window_size=-1), None),
        (model(text={"use_sliding_window": False}, sliding_window_size=4096), None),
        (model(sliding_window_size=4096), "sliding-window"),
        (model(is_hybrid_swa=True), "sliding-window"),
        (model("MLA"), "MLA"),
        (model("SSM"), "Mamba"),
        (model(text={"mamba_d_state": 128}), "Mamba"),
        (model(text={"linear_num_value_heads": 32}), "linear-attention"),
        (model(is_generation=False), "embedding"),
        (model(is_encoder_decoder=True), "encoder-decoder"),
        (model(is_multimodal=True), "multimodal"),
    ],
    ids=[
        *("mha", "no-window", "window-off", "window", "hybrid", "mla", "ssm", "mamba", "linear"),
        *("embedding", "encoder-decoder", "multimodal"),
    ],
)
def test_model(config, reason):
    """Catches a model whose layers the draft pool cannot hold, and refusals of those it can."""
    problem = validate_model(config)
    if reason is None:
        assert problem is None
    else:
        assert "some/model" in problem and reason in problem and problem.endswith(".")


def test_layer_with_a_window_is_found():
    """Catches models that hide their window from the config."""

    class RadixAttention(torch.nn.Module):
        def __init__(self, layer_id: int, window: int) -> None:
            super().__init__()
            self.layer_id, self.sliding_window_size = layer_id, window

    whole, windowed = RadixAttention(0, -1), RadixAttention(7, 512)
    assert validate_layers(torch.nn.ModuleList([whole]), torch.bfloat16) is None
    problem = validate_layers(torch.nn.ModuleList([whole, windowed]), torch.bfloat16)
    assert "layer 7" in problem and "512" in problem
    problem = validate_layers(torch.nn.ModuleList([whole]), torch.float8_e4m3fn)
    assert "float8_e4m3fn" in problem and "--kv-cache-dtype accepts bfloat16" in problem


@pytest.mark.parametrize(
    ("req", "reason"),
    [
        (request(), None),
        (request({"top_k": 2}), "sampling"),
        (request({"top_k": 1 << 30}), "sampling"),
        (request({"frequency_penalty": -0.5}), "penalty"),
        (request({"presence_penalty": 0.1}), "penalty"),
        (request({"repetition_penalty": 1.1}), "penalty"),
        (request({"min_new_tokens": 1}), "penalty"),
        (request({"logit_bias": {"7": 2.0}}), "logit_bias"),
        (request(grammar=object()), "grammar"),
        (request(custom_logit_processor="..."), "custom_logit_processor"),
        (request(return_logprob=True), "logprob"),
        (request(return_hidden_states=True), "hidden_states"),
        (request(return_sampling_mask=True), "sampling_mask"),
        (request(lora_id="a"), "lora"),
        (request(multimodal_inputs=object()), "multimodal"),
        (request(input_embeds=[[0.0]]), "input_embeds"),
        (request(beam_group=0), "beam_search"),
        (request(session=object()), "session"),
    ],
    ids=[
        *("greedy", "top-k", "top-p", "frequency", "presence", "repetition", "min-new"),
        *("logit-bias", "grammar", "processor", "logprob", "hidden", "mask", "lora", "images"),
        *("embeds", "beam", "session"),
    ],
)
def test_request_feature_is_decoded_plainly(req, reason):
    """Catches a feature whose result would differ because drafting forgets it."""
    assert draft_obstacle(req, RequestOptions()) == reason


def test_request_that_disables_drafting():
    """Catches a request that drafts although it asked not to, or that keeps another reason."""
    off = RequestOptions(enabled=False)
    assert draft_obstacle(request(), off) == "disabled_by_request"
    assert draft_obstacle(request(grammar=object()), off) == "disabled_by_request"
