"""What draft steps read and move on, all on the device."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class DraftState:
    """Tensors ``[B]`` int64, contiguous.

    Attributes:
        requests: rows of the request tables; row 0 is padding.
        tokens: the token whose KV the next step computes.
        positions: its path position.
        lengths: rows of the draft view, that token included.
        columns, targets: tokens drafted, and wanted.
        slots: where the next step stores that token's KV.
    """

    requests: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def zeros(cls, count: int, device: torch.device) -> DraftState:
        return cls(*(torch.zeros(count, dtype=torch.int64, device=device) for _ in fields(cls)))

    def first(self, count: int) -> DraftState:
        """Views of the first ``count`` requests."""
        return DraftState(*(getattr(self, field.name)[:count] for field in fields(self)))
