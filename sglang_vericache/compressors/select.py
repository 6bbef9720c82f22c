"""Scores -> the rows that are kept. Pure."""

from __future__ import annotations

import torch

from sglang_vericache.config import RECENT_TOKENS, SINK_TOKENS


def select_rows(
    scores: torch.Tensor, rows: int, start: int, path_end: int, keep_recent: bool = True
) -> torch.Tensor:
    """The ``rows`` best tokens of each head, sinks and recent tokens first.

    Args:
        scores: ``[..., H, T]`` of the interval [start, start + T) of a path.
        rows: how many tokens to keep per head, at most T.
        start: path position of the first score.
        path_end: end of the path; its last RECENT_TOKENS are kept when ``keep_recent``.

    Returns:
        Indices into the interval, ``[..., H, rows]`` int64, ascending, so that the order of a
        path's tokens survives compression. Not-a-number scores are taken last.
    """
    tokens = scores.shape[-1]
    if rows > tokens:
        raise ValueError(f"rows={rows} exceeds the {tokens} tokens of the interval")
    ranked = torch.nan_to_num(scores.float(), nan=float("-inf"), posinf=torch.finfo().max)
    positions = torch.arange(tokens, device=scores.device) + start
    forced = positions < SINK_TOKENS
    if keep_recent:
        forced = forced | (positions >= path_end - RECENT_TOKENS)
    ranked = ranked.masked_fill(forced, float("inf"))
    return ranked.topk(rows, dim=-1).indices.sort(dim=-1).values
