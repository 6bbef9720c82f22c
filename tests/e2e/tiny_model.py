"""A small random model whose next token depends on its context.

Biases of queries and keys make attention look mostly at the last few tokens and a little at all
others: drafts over a compressed cache are then right often but not always, and drafts over
garbage hardly ever, which is what the identity and mutation tests need. Uses the real model's
tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 3, 96, 6, 2, 32, 192
VOCAB, CONTEXT = 49152, 8192
# How much attention writes into the residual stream, and how it prefers close tokens: a constant
# in the fastest rotary pairs of queries and keys adds a logit that falls with the distance.
ATTENTION_GAIN, CLOSENESS, FAST_PAIRS = 0.6, 3.0, 6
_VERSION = 5


def make_tiny_model(directory: Path, tokenizer_from: Path) -> Path:
    """Write the model to ``directory`` and return it; a finished one is left alone."""
    marker = directory / f"complete-{_VERSION}"
    if marker.exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tokenizer_from / name, directory / name)
    save_file(_weights(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(_config()))
    marker.touch()
    return directory


def _config() -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        fan_in = shape[-1]
        return torch.randn(*shape, generator=generator) * scale * fan_in**-0.5

    weights = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN, scale=HIDDEN**0.5),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN, scale=2.0),
    }
    close = torch.zeros(HEAD_DIM)
    close[:FAST_PAIRS] = close[HEAD_DIM // 2 : HEAD_DIM // 2 + FAST_PAIRS] = CLOSENESS
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        weights |= {
            layer + "input_layernorm.weight": torch.ones(HIDDEN),
            layer + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            layer + "self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN, scale=0.5),
            layer + "self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN, scale=0.5),
            layer + "self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.q_proj.bias": close.repeat(HEADS),
            layer + "self_attn.k_proj.bias": close.repeat(KV_HEADS),
            layer + "self_attn.v_proj.bias": torch.zeros(KV_HEADS * HEAD_DIM),
            layer + "self_attn.o_proj.bias": torch.zeros(HIDDEN),
            layer + "self_attn.o_proj.weight": normal(
                HIDDEN, HEADS * HEAD_DIM, scale=ATTENTION_GAIN
            ),
            layer + "mlp.gate_proj.weight": normal(FFN, HIDDEN),
            layer + "mlp.up_proj.weight": normal(FFN, HIDDEN),
            layer + "mlp.down_proj.weight": normal(HIDDEN, FFN),
        }
    return weights
