"""The main pool as span building reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_vericache.compressors.rotary import Rotary


@dataclass(frozen=True)
class FullKV:
    """
    Attributes:
        keys, values: per layer ``[S, H, D]``.
        row_table: ``[R, W]`` int32 main slots by request row and position.
        scaling: softmax scale of the attention layers.
        rotary: rotary embedding by layer; None when the scorer does not ask for it.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    row_table: torch.Tensor
    scaling: float
    rotary: Sequence[Rotary] | None = None

    def slots(self, row: int, start: int, end: int) -> torch.Tensor:
        """``[end - start]`` int64 main slots of a request's tokens."""
        return self.row_table[row, start:end].to(torch.int64)
