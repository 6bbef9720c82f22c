"""Collecting the selected tokens of each head into slots of the draft pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_vericache.kernels.dispatch import runs_triton
from sglang_vericache.kernels.gather_span import reference
from sglang_vericache.kernels.pool_format import PoolStorage

__all__ = ["gather_span", "regather_span"]


def gather_span(
    key_buffers: Sequence[torch.Tensor],
    value_buffers: Sequence[torch.Tensor],
    source_slots: torch.Tensor,
    picks: torch.Tensor,
    storage: PoolStorage,
    target_slots: torch.Tensor,
) -> None:
    """See `reference.gather_span`; `LayerBuffers` save a copy to the device at each call."""
    arguments = (key_buffers, value_buffers, source_slots, picks, storage, target_slots)
    if not runs_triton(source_slots):
        return reference.gather_span(*arguments)
    from sglang_vericache.kernels.gather_span import triton

    return triton.gather_span(*arguments)


def regather_span(
    storage: PoolStorage,
    source_slots: torch.Tensor,
    picks: torch.Tensor,
    target_slots: torch.Tensor,
) -> None:
    """See `reference.regather_span`."""
    arguments = (storage, source_slots, picks, target_slots)
    if not runs_triton(source_slots):
        return reference.regather_span(*arguments)
    from sglang_vericache.kernels.gather_span import triton

    return triton.regather_span(*arguments)
