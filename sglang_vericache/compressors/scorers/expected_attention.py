"""ExpectedAttention: keep what the queries to come are expected to attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_vericache.compressors.base import Granularity, Need, Scope, ScoreInputs, Scorer
from sglang_vericache.compressors.query_stats import StatsWatch
from sglang_vericache.compressors.rotary import turn_back
from sglang_vericache.config import SINK_TOKENS


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Attention of a Gaussian query at the next positions, times the norm of the value.

    Queries before rotary embedding are taken to be normal with the mean m and covariance C of
    those seen in prefill. R being the mean rotation of the next positions and s the softmax
    scale, a key k has the expected weight exp(s m'R'k + s^2/2 k'RCR'k); the weights of a query
    head are divided by their sum, averaged over the heads that share a kv head, and multiplied by
    the norm of the value. Devoto et al., Expected Attention, 2025.

    The mean and covariance come from all queries that the path's prefills computed, of earlier
    turns too: they are kept with the node where the prompt ends, and outlive an evicted span.
    Queries of generated tokens are not seen. Where fewer than 8 queries are known, KeyDiff scores
    instead; the counter ``scored_without`` shows it.

    By default C counts as nothing: of it only the variances and the covariances within rotated
    pairs are kept (`Moments`), and those alone mislead. On SmolLM2 and 8 prompts of 2K, a fifth
    kept, they lose 13.8 % of the attention that follows; the mean alone loses 5.2 %, the whole
    covariance, which is D times as large, 5.2 %, and SnapKV 6.4 % (benchmarks.query_statistics).

    Attributes:
        future: positions after the path's end over which the rotation is averaged.
        covariance: 1 counts the part of C that is kept, 0 leaves it out.
    """

    future: int = 512
    covariance: int = 0

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "Expected Attention, arXiv 2510.00636"
    scope: ClassVar[Scope] = "path"
    needs: ClassVar[frozenset[Need]] = frozenset({"keys", "values", "query_stats"})
    granularity: ClassVar[Granularity] = "head_even"

    def __post_init__(self) -> None:
        if self.future < 1:
            raise ValueError(f"future={self.future} must be at least 1")
        if self.covariance not in (0, 1):
            raise ValueError(f"covariance={self.covariance} must be 0 or 1")

    @property
    def watch(self) -> StatsWatch:
        return StatsWatch()

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        rotary, stats = inputs.rotary, inputs.query_stats
        assert rotary is not None and stats is not None  # see `needs`
        assert inputs.values is not None and inputs.path_end is not None
        turned = turn_back(
            rotary.canonical(inputs.keys.float()), *rotary.average(inputs.path_end, self.future)
        )  # R'k, [T, H, D]
        logits = inputs.scaling * _by_kv_head(turned, stats.mean)  # [H, G, T]
        if self.covariance:
            pairs = rotary.pairs
            product = turned[..., :pairs] * turned[..., pairs : 2 * pairs]
            spread = _by_kv_head(turned.square(), stats.variance) + 2 * _by_kv_head(
                product, stats.cross
            )
            logits = logits + inputs.scaling**2 / 2 * spread
        # The sinks are kept anyway, and would take most of the weight. Not minus infinity: a path
        # of nothing but sinks still has finite scores.
        sinks = torch.arange(logits.shape[-1], device=logits.device) + inputs.start < SINK_TOKENS
        logits = logits.masked_fill(sinks, torch.finfo(logits.dtype).min)
        weight = logits.softmax(dim=-1).mean(dim=1)
        return weight * inputs.values.float().norm(dim=-1).T


def _by_kv_head(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Inner products of ``[T, H, n]`` with ``[Hq, n]`` of the query heads each serves:
    ``[H, G, T]``."""
    heads, width = keys.shape[1:]
    return torch.einsum("thd,hgd->hgt", keys, queries.view(heads, -1, width))
