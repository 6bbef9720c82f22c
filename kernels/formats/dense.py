"""Keys and values as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vericache.kernels.formats.base import PoolFormat


@dataclass(frozen=True)
class DenseFormat(PoolFormat):
    """Keys and values in one floating-point dtype, as the main pool has them."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def row_bytes(self, head_dim: int) -> int:
        return 2 * head_dim * self.dtype.itemsize

    def allocate(
        self, layers: int, slots: int, heads: int, head_dim: int, device: torch.device | str
    ) -> dict[str, torch.Tensor]:
        shape = (layers, slots, heads, head_dim)
        return {
            part: torch.zeros(shape, dtype=self.dtype, device=device) for part in ("keys", "values")
        }

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"keys": keys.to(self.dtype), "values": values.to(self.dtype)}

    def decode(self, stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return stored["keys"], stored["values"]

    def stored_keys(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        return stored["keys"]
