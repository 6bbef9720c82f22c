"""Inputs of scorers, made the way a prefill makes them; the rotary embedding is the tests' own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import torch

from sglang_vericache.compressors.base import ScoreInputs, Scorer
from sglang_vericache.compressors.rotary import Rotary
from sglang_vericache.compressors.watch import Observation
from sglang_vericache.draft.query_capture import QueryCapture

THETA = 10000.0


def make_rotary(
    dim: int, positions: int, interleaved: bool = False, scale: float = 1.0, theta: float = THETA
) -> Rotary:
    """Rotates ``dim`` dimensions; the table is exact to float32."""
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return Rotary((torch.cat([angle.cos(), angle.sin()], 1) * scale).float(), interleaved)


def rotate(x: torch.Tensor, positions: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotary embedding of ``[n, H, D]`` pair by pair in float64, in the model's order."""
    cos, sin = rotary.table[positions].double().chunk(2, dim=-1)
    out = x.double().clone()
    for pair in range(rotary.pairs):
        i, j = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + rotary.pairs)
        a, b, c, s = x[..., i].double(), x[..., j].double(), cos[:, pair], sin[:, pair]
        out[..., i] = a * c[:, None] - b * s[:, None]
        out[..., j] = a * s[:, None] + b * c[:, None]
    return out.to(x.dtype)


def observe(
    scorer: Scorer,
    queries: Sequence[torch.Tensor],
    rotary: Rotary,
    chunks: Sequence[int] = (),
    start: int = 0,
) -> Observation | None:
    """What QueryCapture knows after a prefill in chunks.

    Args:
        queries: by layer ``[n, Hq, D]`` after rotary embedding, of positions from ``start`` on.
        chunks: where a new chunk begins, as offsets; none for one chunk.
    """
    count, heads, dim = queries[0].shape
    backend = SimpleNamespace(forward=lambda q, k, v, layer: None)
    capture = QueryCapture(backend, scorer.watch, [rotary] * len(queries))
    bounds = [0, *chunks, count]
    for a, b in pairwise(bounds):
        # Another request stands first in the batch.
        wanted = capture.range_of("request", start + a, b - a, start + count, offset=3)
        with capture.during([wanted] if wanted else []):
            for layer_id, q in enumerate(queries):
                layer = SimpleNamespace(layer_id=layer_id, tp_q_head_num=heads, qk_head_dim=dim)
                flat = torch.cat([torch.full((3, heads, dim), 1e6), q[a:b]]).flatten(1)
                backend.forward(flat, None, None, layer)
    return capture.observation("request")


def make_inputs(
    scorer: Scorer,
    tokens: int = 120,
    heads: int = 3,
    group: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    chunks: Sequence[int] = (),
) -> ScoreInputs:
    """Random keys, values and what ``scorer`` asks for of random queries, of a path from 0."""
    rotary = make_rotary(dim, tokens + 600)
    keys, values = torch.randn(2, tokens, heads, dim).to(dtype)
    queries = (torch.randn(tokens, heads * group, dim) + torch.randn(heads * group, dim)).to(dtype)
    return inputs_of(scorer, keys, values, queries, rotary, chunks)


def inputs_of(
    scorer: Scorer,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor,
    rotary: Rotary,
    chunks: Sequence[int] = (),
) -> ScoreInputs:
    """As a ViewBuilder gives them to ``scorer`` for a new path that was just computed."""
    seen = observe(scorer, [queries], rotary, chunks) if scorer.watch is not None else None
    return ScoreInputs(
        keys=keys,
        values=values if "values" in scorer.needs else None,
        start=0,
        scaling=keys.shape[-1] ** -0.5,
        path_end=keys.shape[0],
        rotary=rotary,
        **(seen.inputs(0) if seen is not None else {}),
    )
