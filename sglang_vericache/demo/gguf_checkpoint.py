"""A llama-type GGUF file -> a checkpoint folder in Hugging Face's format.

SGLang's own GGUF loader needs CUDA kernels; a converted checkpoint loads everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sglang_vericache.demo import DemoError

# GGUF's names inside a block -> Hugging Face's names inside a layer.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# tokenizer.ggml.token_type of a control token (GGUF specification).
_CONTROL_TOKEN = 3


def convert(source: Path, folder: Path) -> list[str]:
    """Write the checkpoint of ``source`` into ``folder`` and return the names of its files.

    Weights are dequantised to bfloat16.

    Raises:
        DemoError: ``source`` is not a llama-type model with a byte-level BPE tokenizer.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = (fields.get("general.architecture"), fields.get("tokenizer.ggml.model"))
    if found != ("llama", "gpt2"):
        raise DemoError(
            f"{source.name} holds {found[0]} weights and a {found[1]} tokenizer; only llama "
            "weights with a byte-level BPE (gpt2) tokenizer can be converted."
        )
    tied = _write_weights(reader.tensors, fields, folder / "model.safetensors")
    special = {
        f"{name}_token_id": fields[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    _write_json(folder / "config.json", _model_config(fields, tied) | special)
    _write_json(folder / "generation_config.json", special)
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    return [
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def _write_weights(tensors: list[Any], fields: dict[str, Any], target: Path) -> bool:
    """Returns whether the output layer shares the embedding."""
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights: dict[str, torch.Tensor] = {}
    for tensor in tqdm(tensors, desc="converting the model", unit="tensor"):
        *block, name, suffix = tensor.name.split(".")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # [out, in] or [out]
        if name in heads:
            weight = _half_split_rows(weight, heads[name])
        if block:  # blk, number
            name = f"model.layers.{block[1]}.{_BLOCK_NAMES[name]}"
        else:
            name = _MODEL_NAMES[name]
        weights[f"{name}.{suffix}"] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, target, metadata={"format": "pt"})
    return "lm_head.weight" not in weights


def _half_split_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of query and key rows.

    Rotary embedding turns pairs of rows of a head. llama.cpp stores the two of a pair next to
    each other, Hugging Face's code expects all first ones, then all second ones.

    Args:
        weight: ``[heads * head_dim, in]``
    """
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    def llama(key: str) -> Any:
        return fields[f"llama.{key}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": llama("attention.head_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("rope.dimension_count"),
        "max_position_embeddings": llama("context_length"),
        # GGUF holds a float32; 1e-5 reads back as 9.99999974e-06.
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": llama("rope.freq_base"),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if fields.get("tokenizer.ggml.pre") == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type in zip(tokens, types, strict=True)
            if type == _CONTROL_TOKEN
        ]
    )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    } | {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in named.items()
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
