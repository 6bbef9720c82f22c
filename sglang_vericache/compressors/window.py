"""The last queries of a path, which path-scope scorers look through."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QueryWindow:
    """Queries of ascending path positions, for all layers.

    Attributes:
        queries: ``[L, W, Hq, D]``, after rotary embedding.
        positions: W path positions, ascending.
    """

    queries: torch.Tensor
    positions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def start(self) -> int:
        return self.positions[0]

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.positions[-1] + 1

    @property
    def bytes(self) -> int:
        return self.queries.numel() * self.queries.element_size()

    def device_positions(self) -> torch.Tensor:
        """``[W]`` int64 beside the queries."""
        return torch.tensor(self.positions, device=self.queries.device)

    def then(self, later: QueryWindow, limit: int) -> QueryWindow:
        """This window followed by ``later``, the last ``limit`` queries of both."""
        if later.start < self.end:
            raise ValueError(f"window [{later.start}, {later.end}) does not follow {self.end}")
        return QueryWindow(
            torch.cat([self.queries, later.queries], dim=1)[:, -limit:],
            (*self.positions, *later.positions)[-limit:],
        )
