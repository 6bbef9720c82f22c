"""The last queries of a path, which path-scope scorers look through."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QueryWindow:
    """Queries of consecutive or ascending path positions, for all layers.

    Attributes:
        queries: ``[L, W, Hq, D]``, after rotary embedding.
        positions: ``[W]`` int64 path positions, ascending.
        start, end: the first position, and one past the last, known on the host.
    """

    queries: torch.Tensor
    positions: torch.Tensor
    start: int
    end: int

    def __len__(self) -> int:
        return self.positions.numel()

    @property
    def bytes(self) -> int:
        return self.queries.numel() * self.queries.element_size()

    def then(self, later: QueryWindow, limit: int) -> QueryWindow:
        """This window followed by ``later``, the last ``limit`` queries of both."""
        if later.start < self.end:
            raise ValueError(f"window [{later.start}, {later.end}) does not follow {self.end}")
        return QueryWindow(
            torch.cat([self.queries, later.queries], dim=1)[:, -limit:],
            torch.cat([self.positions, later.positions])[-limit:],
            self.start,
            later.end,
        )
