"""What a scorer wants to know of the queries that a prefill computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch

from sglang_vericache.compressors.rotary import Rotary
from sglang_vericache.upload import to_device

# Fewer queries than this say too little about what the path will ask for.
FEWEST_QUERIES = 8


class Observation(ABC):
    """What was seen of the queries of a path, for all layers.

    Attributes:
        start, end: path positions of the first query seen and one past the last.
    """

    start: int
    end: int

    @property
    @abstractmethod
    def count(self) -> int:
        """Queries seen."""

    @property
    @abstractmethod
    def bytes(self) -> int: ...

    @abstractmethod
    def then(self, later: Self) -> Self:
        """This observation followed by ``later``, which must not begin before this one ends."""

    @abstractmethod
    def inputs(self, layer: int) -> Mapping[str, Any]:
        """The fields of ScoreInputs that it fills for one layer."""

    def must_precede(self, later: Observation) -> None:
        if later.start < self.end:
            raise ValueError(
                f"queries [{later.start}, {later.end}) do not follow queries up to {self.end}"
            )


Seen = TypeVar("Seen", bound=Observation)


@dataclass(frozen=True)
class Choice(Generic[Seen]):
    """The observation to score with.

    Attributes:
        observation: None when too little was seen.
        borrowed: it holds queries that an earlier request computed.
    """

    observation: Seen | None
    borrowed: bool = False


class PassRows:
    """Which of a pass's queries are wanted, one request after the other.

    Args:
        starts: path position of the first one of each request.
        counts: how many, at least one each.
        offsets: of the first one in the pass.
    """

    def __init__(
        self, starts: Sequence[int], counts: Sequence[int], offsets: Sequence[int]
    ) -> None:
        self.starts, self.counts, self.offsets = starts, counts, offsets
        self._index: torch.Tensor | None = None

    def index(self, device: torch.device) -> torch.Tensor:
        """``[sum(counts)]`` int64 rows of the pass; the same for every layer."""
        if self._index is None:
            ranges = zip(self.offsets, self.counts, strict=True)
            rows = [row for offset, count in ranges for row in range(offset, offset + count)]
            self._index = to_device(rows, device)
        return self._index


class Watch(ABC, Generic[Seen]):
    """How the queries of a prefill are observed, chunk by chunk and layer by layer.

    Attributes:
        undoes_rotary: `see` needs the layer's rotary embedding.
    """

    undoes_rotary: bool = False

    @abstractmethod
    def first_wanted(self, start: int, prompt_tokens: int) -> int:
        """The first position to be seen when a prompt is computed from ``start`` on."""

    @abstractmethod
    def see(self, queries: torch.Tensor, start: int, rotary: Rotary | None) -> Any:
        """One layer's part of an observation; a copy, the queries do not outlive the layer.

        Args:
            queries: ``[n, Hq, D]`` after rotary embedding, of the positions from ``start`` on.
        """

    @abstractmethod
    def observation(self, parts: Sequence[Any], start: int, end: int) -> Seen:
        """Of the queries [start, end), from what `see` returned for each layer."""

    def keep(self, queries: torch.Tensor, start: int) -> Seen:
        """The observation of all layers' ``queries`` ``[L, n, Hq, D]`` of the positions from
        ``start`` on, which it may take over; for watches that undo no rotary embedding."""
        parts = [self.see(layer, start, None) for layer in queries]
        return self.observation(parts, start, start + queries.shape[1])

    def see_pass(self, queries: torch.Tensor, rows: PassRows, rotary: Rotary | None) -> Any:
        """One layer's part of the observations of all requests of a pass.

        Args:
            queries: ``[N, Hq, D]`` of the whole pass.
        """
        ranges = zip(rows.offsets, rows.counts, rows.starts, strict=True)
        return [
            self.see(queries.narrow(0, offset, count), start, rotary)
            for offset, count, start in ranges
        ]

    def observations(self, parts: Sequence[Any], rows: PassRows) -> list[Seen]:
        """Of each request, from what `see_pass` returned for each layer."""
        ranges = zip(zip(*parts, strict=True), rows.starts, rows.counts, strict=True)
        return [self.observation(seen, start, start + count) for seen, start, count in ranges]

    @abstractmethod
    def choose(self, computed: Seen | None, stored: Seen | None, path_end: int) -> Choice[Seen]:
        """Which queries stand for those that follow a path of ``path_end`` tokens.

        Args:
            computed: what this request's prefill saw.
            stored: what is kept with the deepest node of the path that has anything.
        """
