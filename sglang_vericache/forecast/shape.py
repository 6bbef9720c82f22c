"""What of a model counts here: the bytes of its weights and of a token's KV. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_vericache.config import VeriCacheConfigError

_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True)
class Shape:
    """
    Attributes:
        weight_bytes: that a forward reads.
        token_bytes: keys and values of one token, all layers.
        rows: layers times kv heads: a token has a key and a value in each.
        head_dim: of both.
        layers: of a forward.
    """

    name: str
    weight_bytes: int
    token_bytes: int
    rows: int
    head_dim: int
    layers: int


# Parameters in billions, layers, kv heads, head dimension; bfloat16.
_KNOWN = {
    "llama-3.1-8b": (8.03, 32, 8, 128),
    "llama-3.1-70b": (70.6, 80, 8, 128),
    "qwen3-8b": (8.19, 36, 8, 128),
    "qwen3-32b": (32.8, 64, 8, 128),
    "mistral-small-24b": (23.6, 40, 8, 128),
    "smollm2-135m": (0.135, 30, 3, 64),
}
KNOWN: dict[str, Shape] = {
    name: Shape(
        name, int(billions * 2e9), 2 * layers * heads * dim * 2, layers * heads, dim, layers
    )
    for name, (billions, layers, heads, dim) in _KNOWN.items()
}


def shape_of(model: str) -> Shape:
    """Of a known name, or of a folder with a model's config.json.

    Raises:
        VeriCacheConfigError: neither; or a model whose KV is of another kind.
    """
    if model.lower() in KNOWN:
        return KNOWN[model.lower()]
    file = Path(model) / "config.json"
    if not file.is_file():
        raise VeriCacheConfigError(
            f"--model {model!r} is neither a folder with a config.json nor one of: "
            f"{', '.join(KNOWN)}."
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise VeriCacheConfigError(f"--model {model!r}: {file} is not JSON ({error}).") from None
    return shape_from(model, config)


def shape_from(model: str, config: Mapping[str, Any]) -> Shape:
    """Of the contents of a config.json.

    Raises:
        VeriCacheConfigError: a model whose KV is of another kind.
    """
    config = config.get("text_config") or config
    try:
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        heads, ffn = config["num_attention_heads"], config["intermediate_size"]
        vocabulary = config["vocab_size"]
    except KeyError as error:
        raise VeriCacheConfigError(
            f"--model {model!r}: its config.json has no {error.args[0]}; supported are dense "
            "models with full attention."
        ) from None
    if "kv_lora_rank" in config or config.get("num_local_experts") or config.get("num_experts"):
        raise VeriCacheConfigError(
            f"--model {model!r} has MLA attention or experts: the forecast knows dense models with "
            "full attention only."
        )
    dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    size = _BYTES.get(str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"), 2)
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    weights = layers * (attention + 3 * hidden * ffn) + embeddings
    rows = layers * kv_heads
    return Shape(Path(model).name, weights * size, 2 * rows * dim * size, rows, dim, layers)
