"""How the draft pool stores keys and values: the object that draft attention reads through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


class PoolFormat(ABC):
    """Encoding of one token of one kv head.

    Attributes:
        name: how the configuration calls it.
    """

    name: str

    @abstractmethod
    def row_bytes(self, head_dim: int) -> int:
        """Bytes of key and value of one token and kv head."""

    @abstractmethod
    def allocate(
        self, layers: int, slots: int, heads: int, head_dim: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Storage tensors, each ``[layers, slots, heads, ...]``, zero-filled."""

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[..., head_dim]`` keys and values -> their storage tensors ``[..., ?]``."""

    @abstractmethod
    def decode(self, stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of `encode`, as far as the format keeps it."""


@dataclass(frozen=True)
class DenseFormat(PoolFormat):
    """Keys and values in one floating-point dtype, as the main pool has them."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def row_bytes(self, head_dim: int) -> int:
        return 2 * head_dim * self.dtype.itemsize

    def allocate(self, layers, slots, heads, head_dim, device):
        shape = (layers, slots, heads, head_dim)
        return {
            part: torch.zeros(shape, dtype=self.dtype, device=device) for part in ("keys", "values")
        }

    def encode(self, keys, values):
        return {"keys": keys.to(self.dtype), "values": values.to(self.dtype)}

    def decode(self, stored):
        return stored["keys"], stored["values"]


class PoolStorage:
    """Keys and values of all layers in one format.

    Slot 0 is never handed out: padding reads and writes land there.

    Args:
        slots: usable slots; the storage holds one more.
    """

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

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[*slots.shape, heads, head_dim]`` of one layer."""
        return self.format.decode({name: t[layer, slots] for name, t in self.tensors.items()})

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store ``[N, heads, head_dim]`` keys and values at ``slots`` ``[N]`` of one layer."""
        for name, encoded in self.format.encode(keys, values).items():
            self.tensors[name][layer, slots] = encoded

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot over all layers and heads."""
        return self.layers * self.heads * self.format.row_bytes(self.head_dim)
