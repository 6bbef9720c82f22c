"""Scores of a path's tokens in all layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sglang_vericache.compressors.base import PathKeys, ScoreInputs, Scorer
from sglang_vericache.compressors.watch import Observation
from sglang_vericache.tree.full_kv import FullKV

# Keys and values that may be copied at a time, in float32: layers beyond are scored after them.
MOST_COPIED_BYTES = 128 << 20


@dataclass(frozen=True)
class ScoredPath:
    """
    Attributes:
        source: ``[T]`` int64 main slots of the tokens [start, start + T) of the path.
        end: tokens of the path.
        observation: what is known of its queries, for scorers that look through them.
    """

    full: FullKV
    source: torch.Tensor
    start: int
    end: int
    observation: Observation | None


def path_scores(scorer: Scorer, path: ScoredPath) -> torch.Tensor:
    """``[L, H, T]`` of the tokens in ``path.source``."""
    full, source = path.full, path.source
    keys = PathKeys(full.keys, source, path.start, full.scaling, path.observation)
    scores = scorer.score_layers(keys)
    if scores is not None:
        return scores
    if scorer.needs <= {"keys", "values"}:
        return torch.cat([scorer.score(inputs) for inputs in _of_many_layers(scorer, path)])
    layers = range(len(full.keys))
    return torch.stack([scorer.score(_of_layer(scorer, path, layer)) for layer in layers])


def _of_many_layers(scorer: Scorer, path: ScoredPath) -> Iterator[ScoreInputs]:
    """A few launches for many layers: where contexts are short, launching them is what costs."""
    full, source = path.full, path.source
    _, heads, dim = full.keys[0].shape
    layer_bytes = 2 * 4 * source.numel() * heads * dim
    together = max(MOST_COPIED_BYTES // layer_bytes, 1)
    for first in range(0, len(full.keys), together):
        layers = range(first, min(first + together, len(full.keys)))
        keys = torch.stack([full.keys[layer][source] for layer in layers])
        values = None
        if "values" in scorer.needs:
            values = torch.stack([full.values[layer][source] for layer in layers])
        yield ScoreInputs(keys, values, path.start, full.scaling, path_end=path.end)


def _of_layer(scorer: Scorer, path: ScoredPath, layer: int) -> ScoreInputs:
    full, source, observation = path.full, path.source, path.observation
    observed: Mapping[str, Any] = observation.inputs(layer) if observation is not None else {}
    return ScoreInputs(
        keys=full.keys[layer][source],
        values=full.values[layer][source] if "values" in scorer.needs else None,
        start=path.start,
        scaling=full.scaling,
        path_end=path.end,
        rotary=full.rotary[layer] if full.rotary is not None else None,
        **observed,
    )
