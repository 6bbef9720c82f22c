"""Sums of tokens in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.slot_sums.words import word_dtype

# Rows of a layer that are summed at a time stay in a core's own cache.
_CHUNK = 128


def slot_sums(
    buffers: LayerBuffers,
    weights: torch.Tensor,
    slots: torch.Tensor,
    sums: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """Sum tokens: each word of a row times its weight, over all buffers, modulo 2^64.

    Args:
        buffers: ``[S, H, D]`` each, keys and values alike.
        weights: ``[len(buffers), W]`` int64, see `words.new_weights`.
        slots: ``[n]`` int64 tokens in the buffers.
        sums: ``[P]`` int64, written at ``places`` ``[n]`` int64.
    """
    for part, found in _sums(buffers, weights, slots):
        sums[places[part]] = found


def count_changed(
    buffers: LayerBuffers,
    weights: torch.Tensor,
    slots: torch.Tensor,
    sums: torch.Tensor,
    places: torch.Tensor,
    changed: torch.Tensor,
) -> None:
    """Add to ``changed`` ``[1]`` int32 how many tokens have another sum than ``sums[places]``.

    Args: as for `slot_sums`.
    """
    for part, found in _sums(buffers, weights, slots):
        changed += (found != sums[places[part]]).sum().to(changed.dtype)


def _sums(
    buffers: LayerBuffers, weights: torch.Tensor, slots: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    dtype = word_dtype(buffers)
    for first in range(0, slots.numel(), _CHUNK):
        part = slice(first, first + _CHUNK)
        chosen = slots[part]
        found = torch.zeros(chosen.numel(), dtype=torch.int64, device=slots.device)
        for layer, buffer in enumerate(buffers):
            words = buffer[chosen].flatten(1).view(dtype)
            found += words.to(torch.int64) @ weights[layer]
        yield part, found
