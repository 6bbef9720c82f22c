"""Storing the keys and values of the newest tokens of one layer."""

from __future__ import annotations

import torch

from sglang_vericache.kernels.append_rows import reference
from sglang_vericache.kernels.dispatch import runs_triton
from sglang_vericache.kernels.pool_format import PoolStorage

__all__ = ["append_rows"]


def append_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    storage: PoolStorage,
    layer: int,
) -> None:
    """See `reference.append_rows`."""
    if not runs_triton(keys):
        return reference.append_rows(keys, values, slots, storage, layer)
    from sglang_vericache.kernels.append_rows import triton

    return triton.append_rows(keys, values, slots, storage, layer)
