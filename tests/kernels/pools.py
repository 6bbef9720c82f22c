"""Pools, views and main pools of random numbers for the kernel tests.

Each test runs where it can: on the GPU when there is one, else on CPU tensors, through the torch
references or, with TRITON_INTERPRET=1, through the interpreted kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sglang_vericache.kernels.dispatch import runs_triton
from sglang_vericache.kernels.pool_format import (
    DenseFormat,
    Fp8Format,
    Int4Format,
    PoolFormat,
    PoolStorage,
)

INTERPRETED = runs_triton(torch.zeros(1))
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

FORMATS = (
    DenseFormat(torch.float32),
    DenseFormat(torch.bfloat16),
    DenseFormat(torch.float16),
    Fp8Format(),
    Int4Format(),
)
# The dtype of the model that a pool of each format is tried with.
MODEL_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    # Its kernel has queries in float16, which hold a bf16 model's as they are.
    "fp8_e4m3": torch.float16,
}
ALL_FORMATS = pytest.mark.parametrize("pool_format", FORMATS, ids=lambda f: f.name)


def model_dtype(pool_format: PoolFormat) -> torch.dtype:
    return MODEL_DTYPES.get(pool_format.name, torch.float32)


def filled_storage(
    pool_format: PoolFormat, layers: int, slots: int, heads: int, dim: int
) -> PoolStorage:
    """A pool full of bits, so that rows left alone can be told from rows written."""
    storage = PoolStorage(pool_format, layers, slots, heads, dim, DEVICE)
    for tensor in storage.tensors.values():
        tensor.copy_(torch.randint(0, 100, tensor.shape))
    return storage


def twin(storage: PoolStorage) -> PoolStorage:
    """A pool with the same contents."""
    other = PoolStorage(
        storage.format, storage.layers, storage.slots, storage.heads, storage.head_dim, DEVICE
    )
    for name, tensor in storage.tensors.items():
        other.tensors[name].copy_(tensor)
    return other


def assert_same_bits(found: PoolStorage, wanted: PoolStorage) -> None:
    """Of all slots but the padding."""
    for name, tensor in found.tensors.items():
        bits, others = (
            t[:, 1:].contiguous().view(torch.uint8) for t in (tensor, wanted.tensors[name])
        )
        different = (bits != others).any(dim=-1).nonzero()
        assert not different.numel(), f"{name} differ at layer, slot - 1, head {different[:5]}"


def main_pool(
    layers: int, slots: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Key and value buffers ``[slots, heads, dim]`` of each layer."""
    keys, values = torch.randn(2, layers, slots, heads, dim, device=DEVICE).to(dtype)
    return list(keys), list(values)


@dataclass
class Views:
    """Draft views in the last of two layers; all other slots, the padding included, hold
    not-a-number."""

    storage: PoolStorage
    row_table: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor

    def slots(self, request: int) -> torch.Tensor:
        return self.row_table[self.rows[request], : self.lengths[request]].long()

    def last_slots(self, queries: int) -> torch.Tensor:
        """``[B * queries]`` slots of the newest rows, 0 where a view is empty."""
        found = torch.zeros(len(self.lengths), queries, dtype=torch.int64)
        for request, length in enumerate(self.lengths.tolist()):
            if length:
                found[request] = self.slots(request)[-queries:].cpu()
        return found.flatten().to(DEVICE)


def views(
    pool_format: PoolFormat, lengths: list[int], heads: int, dim: int, spread: float = 1.0
) -> Views:
    """Views of the given lengths that share no slot, in a table wider than the longest.

    Args:
        spread: standard deviation of the keys; more makes attention peaked.
    """
    width, used = max(lengths) + 9, sum(lengths)
    storage = PoolStorage(pool_format, 2, used + 20, heads, dim, DEVICE)
    for tensor in storage.tensors.values():
        if tensor.dtype == torch.uint8:
            tensor.fill_(0x7F)  # e4m3's not-a-number
        elif tensor.dtype.is_floating_point:
            tensor.fill_(float("nan"))
    keys, values = torch.randn(2, used, heads, dim)
    written = torch.randperm(used + 20)[:used] + 1
    dtype = model_dtype(pool_format)
    storage.write(
        1, written.to(DEVICE), (spread * keys).to(DEVICE, dtype), values.to(DEVICE, dtype)
    )
    unused = sorted(set(range(used + 21)) - set(written.tolist()))
    batch = len(lengths)
    rows = torch.randperm(batch + 3)[:batch]
    # Entries past a view's end are stale slots, all of garbage.
    choice = torch.randint(0, len(unused), (batch + 3, width))
    row_table = torch.tensor(unused, dtype=torch.int32)[choice]
    for row, own in zip(rows.tolist(), written.split(lengths), strict=True):
        row_table[row, : len(own)] = own.to(torch.int32)
    return Views(storage, row_table.to(DEVICE), rows.to(DEVICE), torch.tensor(lengths).to(DEVICE))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; not-a-number stays so."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()
