"""Merging in one launch. Grid: (row blocks); a row is a query and head, heads innermost."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of 128 values: 16 bytes a thread of one warp.
BLOCK_ROWS = 4


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    output,  # [rows, DIM], read and written
    lse,  # [rows]
    other,
    other_lse,
    rows,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_D)
    valid = row < rows
    one = tl.load(lse + row, mask=valid, other=float("-inf"))
    two = tl.load(other_lse + row, mask=valid, other=float("-inf"))
    most = tl.maximum(one, two)
    most = tl.where(most == float("-inf"), 0.0, most)
    weight, other_weight = tl.exp2(one - most), tl.exp2(two - most)
    total = tl.maximum(weight + other_weight, 1.1754943508222875e-38)
    at = row[:, None] * DIM + columns[None, :]
    mask = valid[:, None] & (columns < DIM)[None, :]
    first = tl.load(output + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
    merged = (first * weight[:, None] + second * other_weight[:, None]) / total[:, None]
    tl.store(output + at, merged.to(output.dtype.element_ty), mask=mask)


def merge_states(
    output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """As `reference.merge_states`; all tensors are contiguous."""
    for state in (output, lse, other, other_lse):
        assert state.is_contiguous()
    rows, dim = lse.numel(), output.shape[-1]
    if rows == 0:
        return
    merge_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
        output,
        lse,
        other,
        other_lse,
        rows,
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=1,
    )
