"""Eight-bit floating point."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vericache.kernels.formats.base import PoolFormat

E4M3 = torch.float8_e4m3fn
# Every version of torch can index bytes on every device.
STORED = torch.uint8
LARGEST = 448.0  # of e4m3; it has no infinity


@dataclass(frozen=True)
class Fp8Format(PoolFormat):
    """Keys and values cast to e4m3 (4 bits of exponent, 3 of mantissa) without a scale.

    Numbers beyond 448 saturate; rounding is to the nearest, ties to even. Stored as bytes.
    """

    @property
    def name(self) -> str:
        return "fp8_e4m3"

    def row_bytes(self, head_dim: int) -> int:
        return 2 * head_dim

    def allocate(
        self, layers: int, slots: int, heads: int, head_dim: int, device: torch.device | str
    ) -> dict[str, torch.Tensor]:
        shape = (layers, slots, heads, head_dim)
        return {
            part: torch.zeros(shape, dtype=STORED, device=device) for part in ("keys", "values")
        }

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"keys": _saturating_cast(keys), "values": _saturating_cast(values)}

    def decode(self, stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.stored_keys(stored), stored["values"].view(E4M3).float()

    def stored_keys(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        return stored["keys"].view(E4M3).float()


def _saturating_cast(numbers: torch.Tensor) -> torch.Tensor:
    # Whether torch's own cast saturates depends on its version.
    return numbers.float().clamp(-LARGEST, LARGEST).to(E4M3).view(STORED)
