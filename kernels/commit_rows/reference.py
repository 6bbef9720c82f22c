"""Commit in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_vericache.kernels.pool_format import PoolStorage


def commit_rows(
    key_buffers: Sequence[torch.Tensor],
    value_buffers: Sequence[torch.Tensor],
    source_slots: torch.Tensor,
    storage: PoolStorage,
    target_slots: torch.Tensor,
) -> None:
    """Copy whole tokens of every layer from the main pool into the draft pool.

    Args:
        key_buffers, value_buffers: per layer ``[S, H, D]``, the main pool.
        source_slots: ``[N]`` int64 slots of the main pool.
        storage: draft pool, written at ``target_slots`` ``[N]`` int64; slot 0 drops a token.
    """
    for layer, (keys, values) in enumerate(zip(key_buffers, value_buffers, strict=True)):
        storage.write(layer, target_slots, keys[source_slots], values[source_slots])
