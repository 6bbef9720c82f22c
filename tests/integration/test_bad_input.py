"""What a server that cannot work says: a sentence with the flag, before anything is loaded."""

from __future__ import annotations

import json

import cpu_engine
import pytest

cpu_engine.required()

from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()

from sglang.srt.server_args import prepare_server_args  # noqa: E402

from sglang_vericache.host_tier import RATIO  # noqa: E402

DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "vocab_size": 128,
    "torch_dtype": "float32",
}
LATENT = DENSE | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}
MODELS = {
    "MLA": (LATENT, "has MLA attention"),
    "sliding window": (
        DENSE
        | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256},
        "has sliding-window attention",
    ),
    "Mamba": (
        DENSE
        | {
            "architectures": ["FalconH1ForCausalLM"],
            "model_type": "falcon_h1",
            "mamba_d_state": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 2,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
        },
        "has Mamba or linear-attention layers",
    ),
    "encoder-decoder": (
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "vocab_size": 128,
            "max_target_positions": 64,
            "max_source_positions": 64,
            "is_encoder_decoder": True,
        },
        "is an encoder-decoder model",
    ),
    "embedding": (
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 128,
            "max_position_embeddings": 512,
        },
        "is an embedding or reward model",
    ),
}


@pytest.fixture
def model(tmp_path):
    def write(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def resolve(model_path: str, *flags: str):
    """What the launcher does before it spawns anything."""
    common = ["--model-path", model_path, "--device", "cpu", "--skip-tokenizer-init"]
    record = prepare_server_args([*common, "--log-level", "error", *flags])
    record.resolve_once()
    return record


def refusal(model_path: str, *flags: str) -> str:
    with pytest.raises((SystemExit, ValueError)) as caught:
        resolve(model_path, "--enable-vericache", *flags)
    return str(caught.value)


def test_a_dense_model_is_accepted(model):
    """Catches checks that refuse everyone; also what the flag declares."""
    from sglang.srt.arg_groups.overrides import resolution_result

    record = resolve(model(DENSE), "--enable-vericache", "--vericache-horizon", "5")
    assert resolution_result(record, "speculative_algorithm") == "VERICACHE"
    assert resolution_result(record, "speculative_num_draft_tokens") == 6
    assert resolution_result(record, "radix_cache_backend") == "vericache"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {"hicache_ratio": RATIO, "hicache_host_memory_fraction": 0.8, "hicache_size": 0}),
        (
            ("--vericache-host-memory", "2"),
            {"hicache_size": 2 * 2**30 / 1e9, "hicache_host_memory_fraction": None},
        ),
        (
            ("--hicache-ratio", "3"),
            {"hicache_ratio": 3.0, "hicache_host_memory_fraction": None, "hicache_size": 0},
        ),
    ],
)
def test_size_of_the_host_tier(model, monkeypatch, flags, expected):
    """Catches a size that was asked for and that SGLang's share of what is free lowers, and a
    ratio of the user's that is overruled."""
    from sglang.srt.arg_groups.overrides import resolution_result

    monkeypatch.setattr("sglang_vericache.host_tier.free_bytes", lambda: 4 << 30)
    record = resolve(model(DENSE), "--enable-vericache", "--vericache-offload", "auto", *flags)
    assert resolution_result(record, "enable_hierarchical_cache")
    assert {name: resolution_result(record, name) for name in expected} == expected


@pytest.mark.parametrize("kind", MODELS)
def test_model_is_refused_by_what_it_is(model, kind):
    config, what = MODELS[kind]
    # SGLang itself refuses state-space models on CPU before it asks us, unless their prefix
    # cache is off.
    flags = ("--disable-radix-cache",) if kind == "Mamba" else ()
    sentence = refusal(model(config), *flags)
    assert "--enable-vericache does not support" in sentence and what in sentence


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--page-size", "16"), "--page-size 16: it accepts unset or 1"),
        (("--pp-size", "2"), "--pp-size 2: it accepts 1"),
        (("--dp-size", "2"), "--dp-size 2: it accepts 1"),
        (("--tp-size", "2"), "--tp-size 2: it accepts 1"),
        (("--speculative-algorithm", "NGRAM"), "--speculative-algorithm NGRAM yet"),
        (("--enable-mixed-chunk",), "--enable-mixed-chunk: leave that flag out"),
        (("--vericache-keep-ratio", "0"), "--vericache-keep-ratio 0.0 is outside (0, 1]"),
        (("--vericache-keep-ratio", "1.01"), "--vericache-keep-ratio 1.01 is outside (0, 1]"),
        (("--vericache-keep-ratio", "much"), "--vericache-keep-ratio 'much' is not a number"),
        (("--vericache-compressor", "zip"), "no compressor is called 'zip'. Known: snapkv"),
        (("--vericache-compressor", "snapkv:w=3"), "snapkv has no parameter 'w'. Known: window"),
        (("--vericache-draft-memory", "lots"), "--vericache-draft-memory 'lots' is not a size"),
        (("--vericache-horizon", "0"), "--vericache-horizon 0 is too small"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_flag_is_refused_by_name(model, flags, expected):
    assert expected in refusal(model(DENSE), *flags)


def test_flags_without_the_switch_are_refused(model):
    """A setting that silently does nothing is worse than an error."""
    with pytest.raises(SystemExit) as caught:
        resolve(model(DENSE), "--vericache-horizon", "4")
    assert "--vericache-horizon has no effect without --enable-vericache" in str(caught.value)


def test_the_algorithm_name_alone_is_refused(model):
    resolve(model(DENSE), "--enable-vericache")  # registers the name
    with pytest.raises(ValueError, match="is set by --enable-vericache"):
        resolve(model(DENSE), "--speculative-algorithm", "VERICACHE")
