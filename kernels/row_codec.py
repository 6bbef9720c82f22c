"""Device functions that encode rows: the arithmetic of formats/, the same to the bit.

Kernels that use them are launched with ``**EXACT``: a multiplication and an addition that the
compiler fuses round once instead of twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vericache.kernels.formats.hadamard import rotation_block
from sglang_vericache.kernels.pool_format import Int4Format, PoolStorage

EXACT = {"enable_fp_fusion": False}
# The interpreter of triton 3.6 to 3.8 knows no inline assembly, and its casts to bf16 and fp8 do
# not round to the nearest.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LARGEST_STAGES = tl.constexpr(10)  # of a rotation: blocks of up to 1,024
LARGEST_FP8 = tl.constexpr(448.0)
LARGEST_HALF = tl.constexpr(65504.0)
CODE_STEP = tl.constexpr(1 / 15)

TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def rotation_of(storage: PoolStorage) -> int:
    """Size of the rotated blocks of an int4 pool, 0 for other formats."""
    return rotation_block(storage.head_dim) if isinstance(storage.format, Int4Format) else 0


def typed(stored: torch.Tensor) -> torch.Tensor:
    """A pool's tensor as kernels take it: fp8 pools keep their numbers as bytes."""
    return stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored


@triton.jit
def store_rows(
    rows, pool, scales, place, valid,
    PART: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROTATION: tl.constexpr,
):  # fmt: skip
    """Encode rows and store them in one layer of a pool.

    Args:
        rows: ``[ROWS, BLOCK_D]``, zero from column DIM on.
        pool: the tensor "keys" (PART 0) or "values" (PART 1) of the layer.
        scales: the tensor "scales" of the layer; any pointer when ROTATION is 0.
        place: ``[ROWS]`` int64, slot * heads + head.
        valid: ``[ROWS]``, which rows are stored.
        ROTATION: as `rotation_of` gives it.
    """
    if ROTATION > 0:
        words, scale, zero = quantised(rows, ROWS, DIM, BLOCK_D, ROTATION)
        columns = tl.arange(0, BLOCK_D // 4)
        mask = valid[:, None] & (columns < DIM // 4)[None, :]
        tl.store(pool + place[:, None] * (DIM // 4) + columns[None, :], words, mask=mask)
        tl.store(scales + place * 4 + 2 * PART, scale, mask=valid)
        tl.store(scales + place * 4 + 2 * PART + 1, zero, mask=valid)
    else:
        columns = tl.arange(0, BLOCK_D)
        mask = valid[:, None] & (columns < DIM)[None, :]
        stored = to_stored(rows, pool.dtype.element_ty)
        tl.store(pool + place[:, None] * DIM + columns[None, :], stored, mask=mask)


@triton.jit
def to_stored(rows, DTYPE: tl.constexpr):
    """Rows in the pool's floating-point dtype; beyond the largest fp8 number they saturate."""
    if DTYPE == tl.float8e4nv:
        rows = rows.to(tl.float32)
        # Comparisons, because minimum and maximum drop not-a-number.
        rows = tl.where(rows > LARGEST_FP8, LARGEST_FP8, rows)
        rows = tl.where(rows < -LARGEST_FP8, -LARGEST_FP8, rows)
        if INTERPRETED:
            return fp8_bits(rows).to(DTYPE, bitcast=True)
    return rows.to(DTYPE)


@triton.jit
def fp8_bits(rows):
    """The nearest e4m3 numbers of float32 numbers, ties to even, as uint8."""
    size = tl.abs(rows)
    # Eight steps from one power of two to the next; below 2^-6 they get no smaller.
    exponent = tl.maximum(tl.floor(tl.log2(tl.maximum(size, 1e-9))), -6.0)
    steps = size / tl.exp2(exponent - 3.0)
    down = tl.floor(steps)
    rest = steps - down
    odd = down - 2.0 * tl.floor(down / 2.0)
    steps = tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), down + 1.0, down)
    bits = tl.where(rows == rows, 8.0 * (exponent + 6.0) + steps, 127.0).to(tl.int32)
    return (bits | ((rows.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantised(
    rows, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROTATION: tl.constexpr
):
    """Words ``[ROWS, BLOCK_D / 4]``, scales ``[ROWS]`` and zeros ``[ROWS]`` of Int4Format."""
    numbers = rotate_rows(rows.to(tl.float32), ROWS, BLOCK_D, ROTATION)
    inside = (tl.arange(0, BLOCK_D) < DIM)[None, :]
    least = tl.min(tl.where(inside, numbers, float("inf")), axis=1)
    most = tl.max(tl.where(inside, numbers, float("-inf")), axis=1)
    zero = tl.minimum(tl.maximum(least, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)
    scale = tl.minimum((most - least) * CODE_STEP, LARGEST_HALF).to(tl.float16)
    divisor = tl.where(scale > 0.0, scale.to(tl.float32), 1.0)[:, None]
    divisor = tl.broadcast_to(divisor, (ROWS, BLOCK_D))
    codes = tl.floor(tl.div_rn(numbers - zero.to(tl.float32)[:, None], divisor) + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), 15.0).to(tl.int32)
    QUARTER: tl.constexpr = ROTATION // 4
    planes = tl.reshape(codes, (ROWS * BLOCK_D // ROTATION, 4, QUARTER))
    shifts = (4 * tl.arange(0, 4))[None, :, None]
    words = tl.sum(planes << shifts, axis=1)
    return tl.reshape(words, (ROWS, BLOCK_D // 4)).to(tl.int16), scale, zero


@triton.jit
def rotate_rows(rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``[ROWS, WIDTH]`` float32, each BLOCK of the columns times the normalised Hadamard matrix.

    The butterflies of formats/hadamard.py in the same order.
    """
    for stage in tl.static_range(LARGEST_STAGES):
        if (1 << stage) < BLOCK:
            rows = butterflies(rows, ROWS, WIDTH, 1 << stage)
    return rows * (BLOCK**-0.5)


@triton.jit
def butterflies(rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Sum and difference of the two halves of every 2 * HALF columns."""
    pairs = tl.reshape(rows, (ROWS * WIDTH // (2 * HALF), 2, HALF))
    first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
    pairs = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
    return tl.reshape(pairs, (ROWS, WIDTH))
