"""The rotary embedding of a loaded model, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from sglang.srt.layers.rotary_embedding import RotaryEmbedding

from sglang_vericache.compressors.rotary import Rotary
from sglang_vericache.config import VeriCacheConfigError


class ModelRotary(Sequence[Rotary]):
    """Rotary embedding by layer id.

    SGLang's modules replace their tables (to grow or to convert them), so each is read when it is
    asked for.

    Raises:
        VeriCacheConfigError: a layer's embedding is not a plain look-up in one table.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules: list[Any] = []
        for layer_id, module in _rotary_modules(model):
            if not looks_up_one_table(module):
                raise VeriCacheConfigError(
                    "--vericache-compressor: the one chosen must undo the rotary embedding of this "
                    f"model's queries and cannot: layer {layer_id} has "
                    f"{type(module).__name__ if module is not None else 'none that is known'}. "
                    "It can where one table of cosines and sines is read by position (default, "
                    "linear, dynamic, llama3 and yarn). Choose another, for example snapkv."
                )
            self._modules.append(module)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, layer: int) -> Rotary:  # type: ignore[override]  # nobody slices it
        module = self._modules[layer]
        return Rotary(module.cos_sin_cache, interleaved=not module.is_neox_style)


def _rotary_modules(model: torch.nn.Module) -> list[tuple[int, torch.nn.Module | None]]:
    """(layer id, the embedding beside the attention), in the order of layers."""
    found: dict[int, torch.nn.Module | None] = {}
    for module in model.modules():
        for child in module.children():
            if type(child).__name__ == "RadixAttention":
                beside = getattr(module, "rotary_emb", None) or getattr(
                    module, "rotary_pos_emb", None
                )
                found[cast(int, child.layer_id)] = beside
    return sorted(found.items())


def looks_up_one_table(module: torch.nn.Module | None) -> bool:
    """Whether ``module`` differs from SGLang's RotaryEmbedding in nothing but its table."""
    if not isinstance(module, RotaryEmbedding):
        return False
    kinds = type(module).__mro__
    derived = kinds[: kinds.index(RotaryEmbedding)]
    return not any(name.startswith("forward") for kind in derived for name in vars(kind))
