"""Span building in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_vericache.kernels.pool_format import PoolStorage


def gather_span(
    key_buffers: Sequence[torch.Tensor],
    value_buffers: Sequence[torch.Tensor],
    source_slots: torch.Tensor,
    picks: torch.Tensor,
    storage: PoolStorage,
    target_slots: torch.Tensor,
) -> None:
    """Copy the picked tokens of every layer and kv head from the main pool into a span.

    Args:
        key_buffers, value_buffers: per layer ``[S, H, D]``, the main pool.
        source_slots: ``[T]`` int64, main-pool slots of the interval's tokens.
        picks: ``[L, H, n]`` int64, for each layer and head indices into the interval.
        storage: draft pool, written at ``target_slots`` ``[n]``.
    """
    heads = torch.arange(picks.shape[1], device=picks.device)
    for layer in range(picks.shape[0]):
        slots = source_slots[picks[layer].T]  # [n, H]
        keys, values = key_buffers[layer][slots, heads], value_buffers[layer][slots, heads]
        storage.write(layer, target_slots, keys, values)


def regather_span(
    storage: PoolStorage,
    source_slots: torch.Tensor,
    picks: torch.Tensor,
    target_slots: torch.Tensor,
) -> None:
    """Like `gather_span`, but from slots of the draft pool itself: encoded rows move unchanged.

    Precondition: no slot is both a source and a target.
    """
    layers, heads, _ = picks.shape
    slots = source_slots[picks]  # [L, H, n]
    layer = torch.arange(layers, device=picks.device)[:, None, None]
    head = torch.arange(heads, device=picks.device)[None, :, None]
    for tensor in storage.tensors.values():
        tensor[layer, target_slots.view(1, 1, -1), head] = tensor[layer, slots, head]
