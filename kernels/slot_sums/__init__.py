"""One sum of all the bits of a token, over every layer, its keys and its values."""

from __future__ import annotations

import torch

from sglang_vericache.kernels.dispatch import runs_triton
from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.slot_sums import reference
from sglang_vericache.kernels.slot_sums.words import new_weights

__all__ = ["count_changed", "new_weights", "slot_sums"]


def slot_sums(
    buffers: LayerBuffers,
    weights: torch.Tensor,
    slots: torch.Tensor,
    sums: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """See `reference.slot_sums`."""
    if not runs_triton(slots):
        return reference.slot_sums(buffers, weights, slots, sums, places)
    from sglang_vericache.kernels.slot_sums import triton

    return triton.slot_sums(buffers, weights, slots, sums, places)


def count_changed(
    buffers: LayerBuffers,
    weights: torch.Tensor,
    slots: torch.Tensor,
    sums: torch.Tensor,
    places: torch.Tensor,
    changed: torch.Tensor,
) -> None:
    """See `reference.count_changed`."""
    if not runs_triton(slots):
        return reference.count_changed(buffers, weights, slots, sums, places, changed)
    from sglang_vericache.kernels.slot_sums import triton

    return triton.count_changed(buffers, weights, slots, sums, places, changed)
