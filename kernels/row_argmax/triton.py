"""The greatest number of each row in two launches.

torch reduces a row in one program, which is slow for few rows and a large vocabulary; SGLang's own
row_argmax wants float32, and for few rows gives a token beyond the vocabulary where all are NaN.
Grid: (rows, parts of a row), then (rows).

A number and its column are one integer: above, the number's bits in an order that integers have as
well; below, the column with its bits flipped, so that of equal numbers the first is the greatest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns of a part: 16 numbers a thread.
BLOCK = 4096
# Of int32.
GREATEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def ordered(numbers):
    """float32 -> int32 in the same order; both zeros are equal, NaN is the greatest."""
    bits = numbers.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & GREATEST)
    bits = tl.where(bits == -1, 0, bits)  # the negative zero
    return tl.where(numbers != numbers, GREATEST, bits)


@triton.jit(do_not_specialize=["parts"])
def greatest_of_part(
    logits,  # [N, columns], rows row_stride apart
    found,  # [N, parts] int64
    columns,
    row_stride,
    parts,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    numbers = tl.load(logits + row * row_stride + column, mask=mask, other=float("-inf"))
    key = (ordered(numbers.to(tl.float32)).to(tl.int64) << 32) | (column ^ GREATEST).to(tl.int64)
    tl.store(found + row * parts + part, tl.max(key, axis=0))


@triton.jit(do_not_specialize=["parts"])
def greatest_of_row(found, tokens, parts, BLOCK_PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    # Where there is no part, less than any.
    key = tl.load(found + row * parts + part, mask=part < parts, other=-(1 << 63))
    tl.store(tokens + row, (tl.max(key, axis=0) & GREATEST) ^ GREATEST)


def row_argmax(logits: torch.Tensor) -> torch.Tensor:
    """As `reference.row_argmax`; rows may be slices of wider rows."""
    rows, columns = logits.shape
    if logits.stride(1) != 1:
        raise ValueError(f"numbers of a row are {logits.stride(1)} elements apart")
    parts = triton.cdiv(columns, BLOCK)
    found = torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    greatest_of_part[(rows, parts)](
        logits, found, columns, logits.stride(0), parts, BLOCK=BLOCK, num_warps=8
    )
    greatest_of_row[(rows,)](
        found, tokens, parts, BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=1
    )
    return tokens
