"""append_rows: the kernel's bits are those of the formats' encode."""

from __future__ import annotations

import pytest
import torch
from pools import (
    ALL_FORMATS,
    DEVICE,
    assert_same_bits,
    filled_storage,
    model_dtype,
    needs_triton,
    relative_error,
    twin,
)

from sglang_vericache.kernels.append_rows import append_rows, reference
from sglang_vericache.kernels.formats.hadamard import rotate, rotation_block
from sglang_vericache.kernels.pool_format import DenseFormat, Int4Format

DIMS = (64, 80, 96, 128, 256)


def new_rows(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> tuple:
    """Keys and values of very different size, with an outlier in each."""
    keys, values = torch.randn(2, tokens, heads, dim, device=DEVICE)
    keys[..., 3] *= 30
    return keys.to(dtype), (0.05 * values).to(dtype)


@ALL_FORMATS
@pytest.mark.parametrize(("dim", "heads"), list(zip(DIMS, (3, 2, 1, 3, 1), strict=True)))
def test_every_bit(pool_format, dim, heads):
    """Catches rounding in another place than the reference's, keys in the values' place, heads or
    nibbles out of order, and writes to other slots or layers."""
    storage = filled_storage(pool_format, 2, 20, heads, dim)
    wanted = twin(storage)
    keys, values = new_rows(5, heads, dim, model_dtype(pool_format))
    slots = torch.tensor([7, 20, 1, 12, 3], device=DEVICE)
    append_rows(keys, values, slots, storage, 1)
    for name, encoded in pool_format.encode(keys, values).items():
        wanted.tensors[name][1, slots] = encoded
    assert_same_bits(storage, wanted)


@ALL_FORMATS
def test_slices_of_a_wider_row(pool_format):
    """Models hand out keys and values as slices of one projection: catches a stride that is
    assumed, and slots in int32, as row tables have them."""
    dtype = model_dtype(pool_format)
    projected = torch.randn(4, 3 * 2 * 64, device=DEVICE).to(dtype)
    keys, values = (part.view(4, 2, 64) for part in projected.split(2 * 64, dim=1)[1:])
    assert not keys.is_contiguous()
    storage = filled_storage(pool_format, 1, 9, 2, 64)
    wanted = twin(storage)
    slots = torch.tensor([3, 9, 4, 1], dtype=torch.int32, device=DEVICE)
    append_rows(keys, values, slots, storage, 0)
    reference.append_rows(keys, values, slots, wanted, 0)
    assert_same_bits(storage, wanted)


def test_padding_goes_nowhere_else():
    """Catches padded rows of a batch, slot 0, that overwrite a request's."""
    storage = filled_storage(DenseFormat(torch.float32), 1, 5, 2, 64)
    wanted = twin(storage)
    keys, values = new_rows(4, 2, 64, torch.float32)
    append_rows(keys, values, torch.tensor([0, 2, 0, 0], device=DEVICE), storage, 0)
    reference.append_rows(keys[1:2], values[1:2], torch.tensor([2], device=DEVICE), wanted, 0)
    assert_same_bits(storage, wanted)


def test_no_tokens():
    """Catches a launch of nothing, which CUDA refuses."""
    storage = filled_storage(DenseFormat(torch.float32), 1, 5, 2, 64)
    none = torch.zeros(0, 2, 64, device=DEVICE)
    append_rows(none, none, torch.zeros(0, dtype=torch.int64, device=DEVICE), storage, 0)


@needs_triton
@pytest.mark.parametrize("dim", DIMS)
def test_queries_rotated_beside(dim):
    """Catches planes out of order, and an append that suffers from the queries in its launch."""
    from sglang_vericache.kernels.append_rows.triton import append_and_rotate, rotate_queries

    storage = filled_storage(Int4Format(), 1, 9, 2, dim)
    wanted = twin(storage)
    keys, values = new_rows(3, 2, dim, torch.float32)
    query = torch.randn(3, 1, 6, dim, device=DEVICE)
    slots = torch.tensor([3, 9, 4], device=DEVICE)
    rotated = append_and_rotate(keys, values, slots, query, storage, 0)
    reference.append_rows(keys, values, slots, wanted, 0)
    assert_same_bits(storage, wanted)
    assert torch.equal(rotated, rotate_queries(query, storage))
    block = rotation_block(dim)
    planes = rotate(query, block).unflatten(-1, (-1, 4, block // 4))
    # float16 has 11 bits.
    assert relative_error(rotated, planes.transpose(-2, -3).flatten(-3)) < 2**-11


@needs_triton
def test_uneven_tokens_are_refused():
    """Catches rows that would be read from the wrong place."""
    from sglang_vericache.kernels.append_rows.triton import token_stride

    rows = torch.zeros(4, 2, 3, 64)
    assert token_stride(rows) == 3 * 64
    assert token_stride(rows[:, :1]) == 2 * 3 * 64
    assert token_stride(rows[:1, :1]) == 3 * 64
    assert token_stride(torch.zeros(4, 5, 64)[:, :3]) == 5 * 64
    with pytest.raises(ValueError, match="not evenly spaced"):
        token_stride(torch.zeros(4, 3, 3, 64)[:, :2])
    with pytest.raises(ValueError, match="not contiguous"):
        token_stride(rows.transpose(-1, -2))
