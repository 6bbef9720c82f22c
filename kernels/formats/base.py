"""The interface of a pool format."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class PoolFormat(ABC):
    """Encoding of one token of one kv head.

    `encode` and `decode` are the reference: what a kernel writes must decode here, and what
    `encode` writes must be readable by a kernel.

    """

    @property
    @abstractmethod
    def name(self) -> str:
        """How the configuration calls it."""

    @abstractmethod
    def row_bytes(self, head_dim: int) -> int:
        """Bytes of key and value of one token and kv head."""

    @abstractmethod
    def allocate(
        self, layers: int, slots: int, heads: int, head_dim: int, device: torch.device | str
    ) -> dict[str, torch.Tensor]:
        """Storage tensors, each ``[layers, slots, heads, ...]``, zero-filled.

        Each layer of each tensor is contiguous and starts at a multiple of 16 bytes where its
        rows allow it: kernels load up to 16 bytes at a time.
        """

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[..., head_dim]`` keys and values -> their storage tensors ``[..., ?]``."""

    @abstractmethod
    def decode(self, stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of `encode`, as far as the format keeps it."""

    @abstractmethod
    def stored_keys(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """Keys ``[..., head_dim]`` as `decode` gives them, or all of them turned by one rotation
        where that saves undoing it: their lengths and the angles between them are the same.

        Args:
            stored: the storage tensors but the values.
        """
