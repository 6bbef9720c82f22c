"""What a scorer is given and what it declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from sglang_vericache.compressors.query_stats import Moments
from sglang_vericache.compressors.rotary import Rotary
from sglang_vericache.compressors.watch import Observation, Watch

Scope = Literal["node", "path"]
Need = Literal["keys", "values", "queries", "query_stats"]
Granularity = Literal["token", "head_even"]


@dataclass(frozen=True)
class ScoreInputs:
    """Attention state of the tokens [start, start + T) of one path, in one layer.

    Attributes:
        keys: ``[T, H, D]``, after rotary embedding; H kv heads.
        values: ``[T, H, D]``; None when the scorer does not need them.
        start: path position of ``keys[0]``; 0 when a scorer of path scope rates a whole path.
        scaling: the layer's softmax scale.
        queries: ``[W, Hq, D]`` after rotary embedding, the path's last computed queries, oldest
            first; Hq is a multiple of H. None when the scorer does not need them.
        query_positions: ``[W]`` int64 path positions of the queries.
        path_end: tokens of the path, T or more; the next query stands there.
        query_stats: moments ``[Hq, ...]`` of the path's queries; None when not needed.
        rotary: the layer's rotary embedding; None when not needed.
    """

    keys: torch.Tensor
    values: torch.Tensor | None
    start: int
    scaling: float
    queries: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    path_end: int | None = None
    query_stats: Moments | None = None
    rotary: Rotary | None = None


@dataclass(frozen=True)
class PathKeys:
    """The keys of a path in all layers, where the KV pool has them.

    Attributes:
        buffers: per layer ``[S, H, D]``, after rotary embedding.
        slots: ``[T]`` integers, where the tokens [start, start + T) are.
        scaling: softmax scale.
        observation: what was seen of the path's queries; None without.
    """

    buffers: Sequence[torch.Tensor]
    slots: torch.Tensor
    start: int
    scaling: float
    observation: Observation | None


class Scorer(ABC):
    """Rates the tokens of an interval for each kv head; the best are kept.

    A subclass is one file, a frozen dataclass whose fields are the method's parameters, and
    declares:

    Attributes:
        name: how ``--vericache-compressor`` calls it.
        paper: where it comes from.
        scope: ``node`` when a score depends on the interval alone, so that every path through it
            can share the span; ``path`` when it depends on the whole path, its end or its queries.
        needs: the fields of ScoreInputs whose contents it reads; ``query_stats`` includes rotary.
        granularity: ``token`` when all kv heads keep the same tokens, ``head_even`` when each
            keeps its own, the same number of them.
        any_basis: scores depend on nothing but the lengths of keys and the angles between them.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    scope: ClassVar[Scope]
    needs: ClassVar[frozenset[Need]]
    granularity: ClassVar[Granularity]
    any_basis: ClassVar[bool] = False

    @property
    def watch(self) -> Watch[Any] | None:
        """What is to be seen of a prefill's queries; None without a need of that kind."""
        return None

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Scores ``[H, T]`` in float32, higher is kept first. No host synchronisation.

        Inputs of several layers, with L in front of keys' and values' dimensions, give
        ``[L, H, T]`` where queries and their statistics are not needed.
        """

    def score_layers(self, path: PathKeys) -> torch.Tensor | None:
        """Scores ``[L, H, T]`` of all layers at once, or None: layer by layer then."""
        return None
