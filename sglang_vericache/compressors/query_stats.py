"""Mean and covariance of a path's queries before rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_vericache.compressors.rotary import Rotary
from sglang_vericache.compressors.watch import FEWEST_QUERIES, Choice, Observation, Watch
from sglang_vericache.config import SINK_TOKENS

# A chunk is summed up in pieces, so that its float32 copy stays small beside its activations.
PIECE_TOKENS = 1024


@dataclass(frozen=True)
class Moments:
    """First two moments of ``count`` queries, in the canonical order of dimensions (`Rotary`).

    Of the covariance only what the rotary embedding mixes is kept: the variances and, for the two
    dimensions of each rotated pair, their covariance. All of it would be Hq * D * D numbers a
    layer: for 32 layers of 32 heads of 128 dimensions 67 MB a node in float32, against 1.3 MB.

    Attributes:
        mean, variance: ``[..., Hq, D]`` float32.
        cross: ``[..., Hq, R/2]`` covariance within the pairs.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, queries: torch.Tensor, pairs: int) -> Moments:
        """Of ``[n, Hq, D]`` float32 queries whose first ``2 * pairs`` dimensions are rotated."""
        mean = queries.mean(dim=0)
        centred = queries - mean
        cross = (centred[..., :pairs] * centred[..., pairs : 2 * pairs]).mean(dim=0)
        return cls(queries.shape[0], mean, centred.square().mean(dim=0), cross)

    def then(self, other: Moments) -> Moments:
        """Of both sets of queries together, as if they had been seen at once."""
        count = self.count + other.count
        a, b = self.count / count, other.count / count
        apart = other.mean - self.mean
        pairs = self.cross.shape[-1]
        product = apart[..., :pairs] * apart[..., pairs : 2 * pairs]
        return Moments(
            count,
            self.mean + b * apart,
            a * self.variance + b * other.variance + a * b * apart.square(),
            a * self.cross + b * other.cross + a * b * product,
        )

    def layer(self, layer: int) -> Moments:
        return Moments(self.count, self.mean[layer], self.variance[layer], self.cross[layer])

    @classmethod
    def stack(cls, layers: Sequence[Moments]) -> Moments:
        return cls(
            layers[0].count,
            torch.stack([m.mean for m in layers]),
            torch.stack([m.variance for m in layers]),
            torch.stack([m.cross for m in layers]),
        )

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.mean, self.variance, self.cross))


@dataclass(frozen=True)
class QueryStats(Observation):
    """Moments of the queries of all layers.

    Attributes:
        moments: ``[L, Hq, ...]``.
        start, end: the path positions that they come from; there may be gaps.
    """

    moments: Moments
    start: int
    end: int

    @property
    def count(self) -> int:
        return self.moments.count

    @property
    def bytes(self) -> int:
        return self.moments.bytes

    def then(self, later: QueryStats) -> QueryStats:
        self.must_precede(later)
        return QueryStats(self.moments.then(later.moments), self.start, later.end)

    def inputs(self, layer: int) -> Mapping[str, Any]:
        return {"query_stats": self.moments.layer(layer)}


@dataclass(frozen=True)
class StatsWatch(Watch[QueryStats]):
    """Sums up all queries of a prompt behind the sinks, whose queries are unlike any other's."""

    undoes_rotary = True

    def first_wanted(self, start: int, prompt_tokens: int) -> int:
        return max(start, SINK_TOKENS)

    def see(self, queries: torch.Tensor, start: int, rotary: Rotary | None) -> Moments:
        assert rotary is not None, "undoes_rotary asks for it"
        total: Moments | None = None
        # Not Tensor.split, which has no types.
        for piece in torch.split(queries, PIECE_TOKENS):
            moments = Moments.of(rotary.undo(piece, start), rotary.pairs)
            total = moments if total is None else total.then(moments)
            start += piece.shape[0]
        assert total is not None, "a split has a piece even of nothing"
        return total

    def observation(self, parts: Sequence[Moments], start: int, end: int) -> QueryStats:
        return QueryStats(Moments.stack(parts), start, end)

    def choose(
        self, computed: QueryStats | None, stored: QueryStats | None, path_end: int
    ) -> Choice[QueryStats]:
        """All that is known: moments of earlier turns stay true, unlike a window."""
        if computed is None or stored is None:
            known, borrowed = computed or stored, stored is not None
        elif computed.start >= stored.end:
            known, borrowed = stored.then(computed), True
        else:
            # The same tokens were computed again: whichever saw more.
            borrowed = stored.count > computed.count
            known = stored if borrowed else computed
        if known is None or known.count < FEWEST_QUERIES:
            return Choice(None)
        return Choice(known, borrowed)
