"""HiCache on SGLang's CPU engine: a host pool without CUDA's pinning and copy kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# SGLang leaves 10 GiB to everybody else, more than a machine for tests has.
RESERVE_BYTES = 1 << 30


def supply() -> None:
    """Fill in what SGLang lacks; twice does no harm."""
    from sglang.srt.mem_cache.pool_host import base, common, mha

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = RESERVE_BYTES
    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
    if not hasattr(mha, "transfer_kv_direct"):
        mha.transfer_kv_direct = copy_rows


def allocate(dims: tuple[int, ...], dtype: torch.dtype, device: str, **_: object) -> torch.Tensor:
    """Ordinary memory: there is no device that would read it past the operating system."""
    return torch.empty(dims, dtype=dtype, device=device)


def copy_rows(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Rows ``src_indices`` of each source become rows ``dst_indices`` of its destination.

    Args:
        src_layers, dst_layers: pairwise ``[S, H, D]`` and ``[T, H, D]``.
        src_indices, dst_indices: ``[n]`` int64.
    """
    if page_size != 1:
        raise AssertionError(f"pages of {page_size} tokens")
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]
