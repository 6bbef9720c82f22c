"""What a scorer is given and what it declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

Scope = Literal["node", "path"]
Need = Literal["keys", "values", "queries"]


@dataclass(frozen=True)
class ScoreInputs:
    """Attention state of the tokens [start, start + T) of one path, in one layer.

    Attributes:
        keys: ``[T, H, D]``, after rotary embedding; H kv heads.
        values: ``[T, H, D]``.
        start: path position of ``keys[0]``; 0 for scorers of path scope.
        scaling: the layer's softmax scale.
        queries: ``[W, Hq, D]`` after rotary embedding, the path's last computed queries, oldest
            first; Hq is a multiple of H. None when the scorer does not need them.
        query_positions: ``[W]`` int64 path positions of the queries.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: int
    scaling: float
    queries: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None


class Scorer(ABC):
    """Rates the tokens of an interval for each kv head; the best are kept.

    A subclass is one file, a frozen dataclass whose fields are the method's parameters, and
    declares:

    Attributes:
        name: how ``--vericache-compressor`` calls it.
        paper: where it comes from.
        scope: ``node`` when a score depends on the interval alone, so that every path through it
            can share the span; ``path`` when it depends on the whole path and its last queries.
        needs: the fields of ScoreInputs it reads.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    scope: ClassVar[Scope]
    needs: ClassVar[frozenset[Need]]

    @property
    def window_tokens(self) -> int:
        """Queries of the path's end that `score` wants; 0 without the need ``queries``."""
        return 0

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Scores ``[H, T]`` in float32, higher is kept first. No host synchronisation."""
