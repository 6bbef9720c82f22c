"""What a scorer wants to know of the queries that a prefill computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch

from sglang_vericache.compressors.rotary import Rotary

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

    def see_several(
        self,
        queries: torch.Tensor,
        rows: torch.Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        rotary: Rotary | None,
    ) -> list[Any]:
        """What `see` returns, for several requests of one pass.

        Args:
            queries: ``[N, Hq, D]`` of the whole pass.
            rows: ``[sum(counts)]`` int64 rows of ``queries``, one request after the other.
        """
        seen = queries[rows].split_with_sizes(list(counts))
        return [self.see(part, start, rotary) for part, start in zip(seen, starts, strict=True)]

    @abstractmethod
    def observation(self, parts: Sequence[Any], start: int, end: int) -> Seen:
        """Of the queries [start, end), from what `see` returned for each layer."""

    @abstractmethod
    def choose(self, computed: Seen | None, stored: Seen | None, path_end: int) -> Choice[Seen]:
        """Which queries stand for those that follow a path of ``path_end`` tokens.

        Args:
            computed: what this request's prefill saw.
            stored: what is kept with the deepest node of the path that has anything.
        """
