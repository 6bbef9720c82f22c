"""Compiles and loads what builds draft views before the first request needs it.

A kernel that is compiled in a request's first decode step holds up every other request for a second
or two; SGLang warns of each.
"""

from __future__ import annotations

import torch

from sglang_vericache.compressors.base import PathKeys, Scorer
from sglang_vericache.compressors.select import select_rows
from sglang_vericache.compressors.watch import FEWEST_QUERIES, Observation
from sglang_vericache.config import RECENT_TOKENS
from sglang_vericache.kernels.commit_rows import commit_rows
from sglang_vericache.kernels.gather_span import gather_span, regather_span
from sglang_vericache.kernels.pool_format import PoolStorage
from sglang_vericache.tree.full_kv import FullKV

# Queries of a short turn and of a long prompt: kernels differ between them.
WINDOWS = (FEWEST_QUERIES, RECENT_TOKENS)
TOKENS = 256


def warm_up(
    full: FullKV,
    storage: PoolStorage,
    scorer: Scorer,
    query_heads: int,
    dtype: torch.dtype,
) -> None:
    """Score, gather, fold and commit the padding slot 0, which nobody reads.

    Args:
        storage: of the draft pool.
        query_heads, dtype: of the model's queries.
    """
    layers, heads, dim = storage.layers, storage.heads, storage.head_dim
    device = full.row_table.device
    padding = torch.zeros(1, dtype=torch.int64, device=device)
    picks = torch.zeros((layers, heads, 1), dtype=torch.int64, device=device)
    gather_span(full.keys, full.values, padding, picks, storage, padding)
    regather_span(storage, padding, picks, padding)
    commit_rows(full.keys, full.values, padding, storage, padding)
    slots = padding.expand(TOKENS).contiguous()
    for count in WINDOWS:
        queries = torch.zeros((count, query_heads, dim), dtype=dtype, device=device)
        seen = _observed(scorer, queries, full, layers)
        scores = scorer.score_layers(PathKeys(full.keys, slots, 0, full.scaling, seen))
        if scores is not None:
            select_rows(scores, RECENT_TOKENS, 0, TOKENS)


def _observed(
    scorer: Scorer, queries: torch.Tensor, full: FullKV, layers: int
) -> Observation | None:
    """As if these were the last queries of TOKENS."""
    watch = scorer.watch
    if watch is None:
        return None
    start = TOKENS - queries.shape[0]
    rotary = full.rotary if watch.undoes_rotary else None
    parts = [
        watch.see(queries, start, None if rotary is None else rotary[layer])
        for layer in range(layers)
    ]
    return watch.observation(parts, start, TOKENS)
