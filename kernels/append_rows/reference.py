"""Append in torch."""

from __future__ import annotations

import torch

from sglang_vericache.kernels.pool_format import PoolStorage


def append_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    storage: PoolStorage,
    layer: int,
) -> None:
    """Encode and store the keys and values of N tokens in one layer of the draft pool.

    Args:
        keys, values: ``[N, H, D]``, H = ``storage.heads``, D = ``storage.head_dim``.
        slots: ``[N]`` integers, where to; slot 0, the padding, may hold anything afterwards.
    """
    storage.write(layer, slots.long(), keys, values)
