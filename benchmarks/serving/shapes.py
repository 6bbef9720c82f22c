"""Models of which only the shape matters: a config file, random weights, random prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.registry import Case

PREFIX = "shape:"
# Enough for every case; SGLang's request table has a row of so many places for each request.
POSITIONS = 40960
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    # As Llama 3.1 8B.
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    # As Mistral Small 24B.
    "24b": {
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    },
    # To try the benchmark itself without a GPU.
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1024,
    },
}
FLAGS = "--load-format dummy --skip-tokenizer-init"
# Below them lie a tokenizer's special tokens.
FIRST_ID = 256


def write_shape(name: str, folder: Path) -> Path:
    """A model directory for ``--load-format dummy``.

    Raises:
        ValueError: there is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"no shape is called {name!r}; known: {', '.join(SHAPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_LLAMA | SHAPES[name], indent=1)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    return folder


def random_prompts(case: Case, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Prompts of the case's length; those that share a prefix follow one another."""
    source = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [source.randrange(FIRST_ID, vocabulary) for _ in range(count)]

    prefixes = [ids(case.shared_tokens) for _ in range(case.prefixes)] or [[]]
    own = case.context - case.shared_tokens
    return [prefixes[i * len(prefixes) // case.requests] + ids(own) for i in range(case.requests)]
