"""The last queries of a path, as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sglang_vericache.compressors.rotary import Rotary
from sglang_vericache.compressors.watch import (
    FEWEST_QUERIES,
    Choice,
    Observation,
    PassRows,
    Watch,
)
from sglang_vericache.config import RECENT_TOKENS
from sglang_vericache.upload import to_device


@dataclass(frozen=True)
class QueryWindow(Observation):
    """Queries of ascending path positions, for all layers.

    Attributes:
        queries: ``[L, W, Hq, D]``, after rotary embedding.
        positions: W path positions, ascending.
        limit: the most queries that a longer window keeps.
    """

    queries: torch.Tensor
    positions: tuple[int, ...]
    limit: int

    @property
    def count(self) -> int:
        return len(self.positions)

    # Observation declares these two as attributes, which other observations store.
    @property
    def start(self) -> int:  # type: ignore[override]
        return self.positions[0]

    @property
    def end(self) -> int:  # type: ignore[override]
        return self.positions[-1] + 1

    @property
    def bytes(self) -> int:
        return self.queries.numel() * self.queries.element_size()

    @cached_property
    def device_positions(self) -> torch.Tensor:
        """``[W]`` int64 beside the queries."""
        return to_device(self.positions, self.queries.device)

    def then(self, later: QueryWindow) -> QueryWindow:
        self.must_precede(later)
        return QueryWindow(
            torch.cat([self.queries, later.queries], dim=1)[:, -self.limit :],
            (*self.positions, *later.positions)[-self.limit :],
            self.limit,
        )

    def inputs(self, layer: int) -> Mapping[str, Any]:
        return {"queries": self.queries[layer], "query_positions": self.device_positions}


@dataclass(frozen=True)
class WindowWatch(Watch[QueryWindow]):
    """Keeps the last queries of a prompt.

    Attributes:
        tokens: how many.
    """

    tokens: int

    def first_wanted(self, start: int, prompt_tokens: int) -> int:
        return max(start, prompt_tokens - self.tokens)

    def see(self, queries: torch.Tensor, start: int, rotary: Rotary | None) -> torch.Tensor:
        return queries.clone()

    def see_pass(
        self, queries: torch.Tensor, rows: PassRows, rotary: Rotary | None
    ) -> torch.Tensor:
        """In one copy: what it takes to launch that is what a short prompt waits for."""
        return queries.index_select(0, rows.index(queries.device))

    def observations(self, parts: Sequence[torch.Tensor], rows: PassRows) -> list[QueryWindow]:
        seen = torch.stack(list(parts)).split_with_sizes(list(rows.counts), dim=1)
        return [
            # A part of it would keep the whole.
            self.keep(queries.clone() if len(seen) > 1 else queries, start)
            for queries, start in zip(seen, rows.starts, strict=True)
        ]

    def keep(self, queries: torch.Tensor, start: int) -> QueryWindow:
        return QueryWindow(queries, tuple(range(start, start + queries.shape[1])), self.tokens)

    def observation(self, parts: Sequence[torch.Tensor], start: int, end: int) -> QueryWindow:
        return self.keep(torch.stack(list(parts)), start)

    def choose(
        self, computed: QueryWindow | None, stored: QueryWindow | None, path_end: int
    ) -> Choice[QueryWindow]:
        # Queries from before the recent tokens would rate nothing of what came after them.
        oldest = path_end - RECENT_TOKENS
        if computed is not None and computed.count >= FEWEST_QUERIES and computed.end >= oldest:
            return Choice(computed)
        if stored is not None and stored.end >= oldest:
            if computed is not None and computed.start >= stored.end:
                stored = stored.then(computed)
            return Choice(stored, borrowed=True)
        return Choice(None)
