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
    if ROTATION == DIM and (DIM == 64 or DIM == 128):
        words, scale, zero = quantised_whole(rows, ROWS, DIM)
    else:
        words, scale, zero = quantised_blocks(rows, ROWS, DIM, BLOCK_D, ROTATION)
    return words, scale, zero


@triton.jit
def quantised_blocks(
    rows, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROTATION: tl.constexpr
):
    """As `quantised`, for rows of any size: each butterfly passes through shared memory."""
    numbers = rotate_rows(rows.to(tl.float32), ROWS, BLOCK_D, ROTATION)
    inside = (tl.arange(0, BLOCK_D) < DIM)[None, :]
    least = tl.min(tl.where(inside, numbers, float("inf")), axis=1)
    most = tl.max(tl.where(inside, numbers, float("-inf")), axis=1)
    scale, zero, divisor, inverse = scale_of(least, most, ROWS)
    codes = code_of(numbers, zero.to(tl.float32)[:, None], divisor[:, None], inverse[:, None])
    QUARTER: tl.constexpr = ROTATION // 4
    planes = tl.reshape(codes, (ROWS * BLOCK_D // ROTATION, 4, QUARTER))
    shifts = (4 * tl.arange(0, 4))[None, :, None]
    words = tl.sum(planes << shifts, axis=1)
    return tl.reshape(words, (ROWS, BLOCK_D // 4)).to(tl.int16), scale, zero


@triton.jit
def quantised_whole(rows, ROWS: tl.constexpr, DIM: tl.constexpr):
    """As `quantised`, for rows of 64 or 128 numbers that are rotated as a whole.

    The same butterflies in the same order, between tensors that each hold a part of the columns:
    nothing moves but once, between the third stage and the fourth. Before, a thread holds eight
    neighbours, as they were loaded; after, every eighth number of a row, as words need them.
    """
    x0, x1, x2, x3, x4, x5, x6, x7 = eighths(rows.to(tl.float32), ROWS, DIM)
    pairs = tl.join(tl.join(x0, x4), tl.join(x2, x6)), tl.join(tl.join(x1, x5), tl.join(x3, x7))
    columns = tl.reshape(tl.join(pairs[0], pairs[1]), (ROWS, DIM // 8, 8))
    columns = tl.reshape(tl.permute(columns, (0, 2, 1)), (8 * ROWS, DIM // 8))
    x0, x1, x2, x3, x4, x5, x6, x7 = eighths(columns, 8 * ROWS, DIM // 8)
    NORM: tl.constexpr = DIM**-0.5
    if DIM == 128:
        x0, y0 = neighbours(x0, 8 * ROWS, 2)
        x1, y1 = neighbours(x1, 8 * ROWS, 2)
        x2, y2 = neighbours(x2, 8 * ROWS, 2)
        x3, y3 = neighbours(x3, 8 * ROWS, 2)
        x4, y4 = neighbours(x4, 8 * ROWS, 2)
        x5, y5 = neighbours(x5, 8 * ROWS, 2)
        x6, y6 = neighbours(x6, 8 * ROWS, 2)
        x7, y7 = neighbours(x7, 8 * ROWS, 2)
        least = tl.minimum(
            least_of(x0, x1, x2, x3, x4, x5, x6, x7), least_of(y0, y1, y2, y3, y4, y5, y6, y7)
        )
        most = tl.maximum(
            most_of(x0, x1, x2, x3, x4, x5, x6, x7), most_of(y0, y1, y2, y3, y4, y5, y6, y7)
        )
        scale, zero, z, d, r = spread_scale(least, most, ROWS, NORM)
        # Number i of these has bits 3 to 5 of its column from i; bit 6 is set in y.
        w0 = word_of(x0, x4, y0, y4, z, d, r, NORM)
        w1 = word_of(x1, x5, y1, y5, z, d, r, NORM)
        w2 = word_of(x2, x6, y2, y6, z, d, r, NORM)
        w3 = word_of(x3, x7, y3, y7, z, d, r, NORM)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    else:
        least = least_of(x0, x1, x2, x3, x4, x5, x6, x7)
        most = most_of(x0, x1, x2, x3, x4, x5, x6, x7)
        scale, zero, z, d, r = spread_scale(least, most, ROWS, NORM)
        w0 = word_of(x0, x2, x4, x6, z, d, r, NORM)
        w1 = word_of(x1, x3, x5, x7, z, d, r, NORM)
        words = tl.join(w0, w1)
    words = tl.permute(tl.reshape(words, (ROWS, 8, DIM // 32)), (0, 2, 1))
    return tl.reshape(words, (ROWS, DIM // 4)), scale, zero


@triton.jit
def neighbours(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums and differences of neighbouring columns: ``[ROWS, WIDTH / 2]`` each."""
    first, second = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
    return first + second, first - second


@triton.jit
def eighths(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Three stages of butterflies of ``[ROWS, WIDTH]``: number i of the results, each
    ``[ROWS, WIDTH / 8]``, holds the columns that are i modulo 8."""
    s, d = neighbours(x, ROWS, WIDTH)
    s0, s1 = neighbours(s, ROWS, WIDTH // 2)
    d0, d1 = neighbours(d, ROWS, WIDTH // 2)
    x0, x4 = neighbours(s0, ROWS, WIDTH // 4)
    x2, x6 = neighbours(s1, ROWS, WIDTH // 4)
    x1, x5 = neighbours(d0, ROWS, WIDTH // 4)
    x3, x7 = neighbours(d1, ROWS, WIDTH // 4)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def least_of(x0, x1, x2, x3, x4, x5, x6, x7):
    first = tl.minimum(tl.minimum(x0, x1), tl.minimum(x2, x3))
    return tl.minimum(first, tl.minimum(tl.minimum(x4, x5), tl.minimum(x6, x7)))


@triton.jit
def most_of(x0, x1, x2, x3, x4, x5, x6, x7):
    first = tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))
    return tl.maximum(first, tl.maximum(tl.maximum(x4, x5), tl.maximum(x6, x7)))


@triton.jit
def spread_scale(least, most, ROWS: tl.constexpr, NORM: tl.constexpr):
    """Of ``[8 * ROWS, 1]`` extremes, not yet normalised: scale and zero ``[ROWS]`` float16, then
    zero, divisor and its inverse ``[8 * ROWS, 1]`` float32."""
    least = tl.min(tl.reshape(least, (ROWS, 8)), axis=1) * NORM
    most = tl.max(tl.reshape(most, (ROWS, 8)), axis=1) * NORM
    scale, zero, divisor, inverse = scale_of(least, most, ROWS)
    return (
        scale,
        zero,
        spread(zero.to(tl.float32), ROWS),
        spread(divisor, ROWS),
        spread(inverse, ROWS),
    )


@triton.jit
def spread(numbers, ROWS: tl.constexpr):
    return tl.reshape(tl.broadcast_to(numbers[:, None], (ROWS, 8)), (8 * ROWS, 1))


@triton.jit
def scale_of(least, most, ROWS: tl.constexpr):
    """Scale and zero as float16, and what to divide by and its inverse as float32."""
    zero = tl.minimum(tl.maximum(least, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)
    scale = tl.minimum((most - least) * CODE_STEP, LARGEST_HALF).to(tl.float16)
    divisor = tl.where(scale > 0.0, scale.to(tl.float32), 1.0)
    return scale, zero, divisor, tl.div_rn(tl.full([ROWS], 1.0, tl.float32), divisor)


@triton.jit
def word_of(x0, x1, x2, x3, zero, divisor, inverse, NORM: tl.constexpr):
    """Words of numbers, not yet normalised, of the four quarters of a row."""
    x0 = code_of(x0 * NORM, zero, divisor, inverse)
    x1 = code_of(x1 * NORM, zero, divisor, inverse)
    x2 = code_of(x2 * NORM, zero, divisor, inverse)
    x3 = code_of(x3 * NORM, zero, divisor, inverse)
    return (x0 | (x1 << 4) | (x2 << 8) | (x3 << 12)).to(tl.int16)


@triton.jit
def code_of(numbers, zero, divisor, inverse):
    """Codes 0 to 15 as int32.

    The quotient is rounded as a division rounds it: the product with the rounded inverse is off by
    one unit at most, which the remainder, exact in a fused multiplication and addition, corrects
    (Markstein). A division proper takes three times the instructions.
    """
    above = numbers - zero
    if INTERPRETED:  # multiplies and adds with two roundings
        quotient = above / divisor
    else:
        quotient = above * inverse
        quotient = tl.fma(tl.fma(-quotient, divisor, above), inverse, quotient)
    return tl.minimum(tl.maximum(quotient + 0.5, 0.0), 15.0).to(tl.int32)


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
