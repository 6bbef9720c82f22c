"""Copying exact keys and values of accepted tokens into the tails."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_vericache.kernels.commit_rows import reference
from sglang_vericache.kernels.dispatch import runs_triton
from sglang_vericache.kernels.pool_format import PoolStorage

__all__ = ["commit_rows"]


def commit_rows(
    key_buffers: Sequence[torch.Tensor],
    value_buffers: Sequence[torch.Tensor],
    source_slots: torch.Tensor,
    storage: PoolStorage,
    target_slots: torch.Tensor,
) -> None:
    """See `reference.commit_rows`; `LayerBuffers` save a copy to the device at each call."""
    arguments = (key_buffers, value_buffers, source_slots, storage, target_slots)
    if not runs_triton(source_slots):
        return reference.commit_rows(*arguments)
    from sglang_vericache.kernels.commit_rows import triton

    return triton.commit_rows(*arguments)
