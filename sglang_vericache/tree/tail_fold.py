"""Compressing the older parts of several tails in a few launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sglang_vericache.compressors.base import ScoreInputs, Scorer
from sglang_vericache.compressors.select import select_rows
from sglang_vericache.kernels.gather_span import regather_span
from sglang_vericache.kernels.pool_format import PoolStorage
from sglang_vericache.tree.view import DraftView

# Decoded keys and values that may exist at a time: tails beyond are folded in further launches.
MOST_DECODED_BYTES = 128 << 20
# A share of this part of another is folded as if it were that one.
ALIKE = 0.9


@dataclass(frozen=True)
class TailFold:
    """Attributes:
    source: ``[T]`` int64 slots of the tail's rows that are compressed, from its start on.
    rest: slots of the tail that stay as they are.
    targets: ``[rows]`` int64 slots for what is kept of ``source``.
    """

    view: DraftView
    source: torch.Tensor
    rest: torch.Tensor
    targets: torch.Tensor


def groups_by_share(
    views: Sequence[DraftView], tokens: int
) -> Iterator[tuple[int, list[DraftView]]]:
    """(rows, views) whose next ``tokens`` tokens are folded together; a view whose row limit
    leaves no room for its share is in none.

    Shares that differ by little are made the same, for which the limits have room.
    """
    shares = [(_share(view, tokens), view) for view in views]
    waiting = [(share, view) for share, view in shares if share <= _room(view, tokens)]
    while waiting:
        most = max(share for share, _ in waiting)
        alike = [v for share, v in waiting if share >= ALIKE * most and _room(v, tokens) >= most]
        yield most, alike
        waiting = [(share, view) for share, view in waiting if view not in alike]


def _share(view: DraftView, tokens: int) -> int:
    return view.budget.folded_rows(tokens, view.tail_start + tokens, view.span_rows)


def _room(view: DraftView, tokens: int) -> int:
    """Rows that its limit leaves for a span of so many tokens."""
    return view.budget.folded_limit_rows(view.tail_start + tokens) - view.span_rows


def fold_tails(
    storage: PoolStorage, scorer: Scorer, scaling: float, folds: Sequence[TailFold]
) -> None:
    """Select rows of each tail and copy them, encoded as they are.

    A tail's own rows are exact copies, there even when the full KV is away.

    Args:
        folds: T and rows are the same for all.
    """
    if not folds:
        return
    tokens = folds[0].source.numel()
    row_bytes = 2 * 4 * storage.layers * storage.heads * storage.head_dim
    together = max(MOST_DECODED_BYTES // (row_bytes * tokens), 1)
    for first in range(0, len(folds), together):
        _fold(storage, scorer, scaling, folds[first : first + together])


def _fold(storage: PoolStorage, scorer: Scorer, scaling: float, folds: Sequence[TailFold]) -> None:
    source = torch.stack([fold.source for fold in folds])
    values: torch.Tensor | None = None
    if scorer.any_basis:
        keys = storage.read_stored_keys(source)  # [L, B, T, H, D]
    else:
        keys, values = storage.read_layers(source)
    # Sinks are in the first span of a path, never in a tail, so the starts need not be told apart.
    start = min(fold.view.tail_start for fold in folds)
    tokens, rows = source.shape[1], folds[0].targets.numel()
    scores = scorer.score(ScoreInputs(keys, values, start, scaling, path_end=start + tokens))
    picks = select_rows(scores, rows, start, start + tokens, keep_recent=False)  # [L, B, H, rows]
    offsets = torch.arange(len(folds), device=source.device) * tokens
    picks = (picks + offsets[:, None, None]).transpose(1, 2).flatten(2)
    targets = torch.cat([fold.targets for fold in folds])
    regather_span(storage, source.flatten(), picks, targets)
