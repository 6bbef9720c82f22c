"""Attention mass that the last queries of a path pay each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_vericache.kernels.dispatch import runs_triton
from sglang_vericache.kernels.score_window import reference

__all__ = ["score_window"]


def score_window(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    key_buffers: Sequence[torch.Tensor],
    slots: torch.Tensor,
    start: int,
    scaling: float,
) -> torch.Tensor:
    """See `reference.score_window`; `LayerBuffers` save a copy to the device at each call."""
    arguments = (queries, query_positions, key_buffers, slots, start, scaling)
    if not runs_triton(queries):
        return reference.score_window(*arguments)
    from sglang_vericache.kernels.score_window import triton

    return triton.score_window(*arguments)
