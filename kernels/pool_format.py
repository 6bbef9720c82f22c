"""How the draft pool stores keys and values: the object that draft attention reads through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_vericache.kernels.formats import (
    FORMATS,
    DenseFormat,
    Fp8Format,
    Int4Format,
    PoolFormat,
    create_format,
)

__all__ = [
    "FORMATS",
    "DenseFormat",
    "Fp8Format",
    "Int4Format",
    "PoolFormat",
    "PoolStorage",
    "create_format",
]


class PoolStorage:
    """Keys and values of all layers in one format.

    Slot 0 is never handed out: padding reads and writes land there.

    Args:
        slots: usable slots; the storage holds one more.

    Attributes:
        tensors: by name, each ``[layers, slots + 1, heads, ...]``, or one of those a layer
            (`over`); which there are and what they hold is the format's affair.
    """

    tensors: dict[str, Any]

    def __init__(
        self,
        pool_format: PoolFormat,
        layers: int,
        slots: int,
        heads: int,
        head_dim: int,
        device: torch.device | str,
    ) -> None:
        self.format = pool_format
        self.layers, self.slots, self.heads, self.head_dim = layers, slots, heads, head_dim
        self.tensors = pool_format.allocate(layers, slots + 1, heads, head_dim, device)

    @classmethod
    def over(cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> PoolStorage:
        """Somebody else's pool, without a copy, for attention and for writing.

        Args:
            keys, values: of each layer ``[S, H, D]`` numbers of 16 or 32 bits, contiguous.

        Raises:
            ValueError: they are anything else.
        """
        first = keys[0]
        if first.dtype.itemsize < 2 or not first.is_floating_point():
            raise ValueError(f"keys and values are {first.dtype}: they would need scales")
        for buffer in (*keys, *values):
            like = buffer.shape == first.shape and buffer.dtype == first.dtype
            if not like or buffer.dim() != 3 or not buffer.is_contiguous():
                raise ValueError("keys and values must be [S, H, D] of one shape, contiguous")
        storage = object.__new__(cls)
        storage.format = DenseFormat(first.dtype)
        storage.layers, storage.slots = len(keys), first.shape[0] - 1
        storage.heads, storage.head_dim = first.shape[1:]
        storage.tensors = {"keys": keys, "values": values}
        return storage

    @property
    def device(self) -> torch.device:
        return self.tensors["keys"][0].device

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[*slots.shape, heads, head_dim]`` of one layer."""
        return self.format.decode({name: t[layer][slots] for name, t in self.tensors.items()})

    def read_layers(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[L, *slots.shape, heads, head_dim]`` of all layers."""
        return self.format.decode({name: t[:, slots] for name, t in self.tensors.items()})

    def read_stored_keys(self, slots: torch.Tensor) -> torch.Tensor:
        """Keys as `read_layers` gives them, but in the basis that they are stored in."""
        tensors = {name: t for name, t in self.tensors.items() if name != "values"}
        return self.format.stored_keys({name: t[:, slots] for name, t in tensors.items()})

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store ``[N, heads, head_dim]`` keys and values at ``slots`` ``[N]`` of one layer."""
        for name, encoded in self.format.encode(keys, values).items():
            self.tensors[name][layer][slots] = encoded

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot over all layers and heads."""
        return self.layers * self.heads * self.format.row_bytes(self.head_dim)
