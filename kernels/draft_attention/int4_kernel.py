"""Split attention over four-bit rows, dequantised in registers.

With code c, scale s and zero z of a row, in the rotated basis:

    score = q . (z + s c) = s (q . c) + z sum(q)        output = sum w (z + s c) = (w s) . c + w . z

so the codes themselves are the operands of the products. A nibble masked out of its 16-bit word is
a float16 as it stands: the subnormal number code * 2^-24, or 16 times that for the nibbles at bit 4
and 12. Tensor cores take subnormals at full speed, so unpacking costs one AND for two codes, and
words in the layout of a 16-bit operand give planes in the same: words go from shared memory
straight into registers, and no bytes are moved between those.

A block of rows is little work, so what a program does beside the products decides: it is one warp
where it can be, which waits for no other; the slots of the next block are in registers when its
rows are asked for; and softmax is taken of the queries only, not of what pads them to a tile.

Grid: (kv heads, splits, requests), as in dense_kernel.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_vericache.kernels.draft_attention.combine import finish
from sglang_vericache.kernels.draft_attention.softmax import (
    LOG2_E,
    softmax_step,
    split_bounds,
    to_base_2,
)
from sglang_vericache.kernels.row_codec import INTERPRETED

# What a nibble at bit 0 and at bit 4 must be multiplied by to be its code.
UNIT_LOW = tl.constexpr(2.0**24)
UNIT_HIGH = tl.constexpr(2.0**20)
# Two words at a time; the compiler would take them apart. And an assembly for each plane: one with
# four results is left in the layout of the load, and the planes take the way through shared memory
# in place of the words.
PLANE_0 = tl.constexpr("and.b32 $0, $1, 0x000f000f;")
PLANE_1 = tl.constexpr("and.b32 $0, $1, 0x00f000f0;")
PLANE_2 = tl.constexpr("{.reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, 0x000f000f;}")
PLANE_3 = tl.constexpr("{.reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, 0x00f000f0;}")
# Queries that fill half a tile of the tensor cores.
HALF_TILE = tl.constexpr(8)


@triton.jit
def code_plane(words, PLANE: tl.constexpr):
    """Words -> float16 of the same shape, codes / UNIT_LOW for planes 0 and 2, codes / UNIT_HIGH
    for planes 1 and 3."""
    if INTERPRETED:
        codes = words >> 8 if PLANE >= 2 else words
        return (codes & (0x0F if PLANE % 2 == 0 else 0xF0)).to(tl.float16, bitcast=True)
    code: tl.constexpr = (
        PLANE_0 if PLANE == 0 else PLANE_1 if PLANE == 1 else PLANE_2 if PLANE == 2 else PLANE_3
    )
    return tl.inline_asm_elementwise(code, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def without_padding(tile, WIDTH: tl.constexpr, HALVED: tl.constexpr):
    """``[BLOCK_M, WIDTH]`` -> the first half of the rows when HALVED. A thread has rows m and m + 8
    of a product, so this only drops registers."""
    if HALVED:
        halves = tl.reshape(tile, (2, HALF_TILE, WIDTH))
        tile, _padding = tl.split(tl.permute(halves, (1, 2, 0)))
    return tile


@triton.jit
def with_padding(tile, WIDTH: tl.constexpr, HALVED: tl.constexpr):
    """The way back, with the rows once more as padding: nobody reads what comes of those."""
    if HALVED:
        twice = tl.broadcast_to(tile[None, :, :], (2, HALF_TILE, WIDTH))
        tile = tl.reshape(twice, (2 * HALF_TILE, WIDTH))
    return tile


@triton.jit
def half_at(quad, SHIFT: tl.constexpr):
    """The float16 at bit SHIFT of an int64, in float32."""
    return ((quad >> SHIFT) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def plane_of_query(query_at, mask, QUARTER: tl.constexpr, PLANE: tl.constexpr):
    """``[M, D / 4]`` float16, one plane of the rotated queries; the upper nibbles' 16 is taken
    out here."""
    plane = tl.load(query_at + PLANE * QUARTER, mask=mask, other=0.0)
    return plane if PLANE % 2 == 0 else plane * 0.0625


@triton.jit
def store_plane(accumulated, zeros, at, mask, PLANE: tl.constexpr, QUARTER: tl.constexpr):
    """One plane of the partial result, in the dimensions' own order."""
    unit: tl.constexpr = UNIT_LOW if PLANE % 2 == 0 else UNIT_HIGH
    tl.store(at + PLANE * QUARTER, accumulated * unit + zeros, mask=mask)


@triton.jit(do_not_specialize=["num_splits"])
def attend_int4(
    rotated,  # [B * QUERIES, HEADS * GROUP, DIM] float16, plane after plane
    keys,  # [S, HEADS, DIM / 4] int16, one layer of the pool
    values,
    scales,  # [S, HEADS] int64: the four float16 of a row
    row_table,  # [R, table_width] slots
    rows,  # [B]
    lengths,  # [B]
    output,  # [B * QUERIES, HEADS * GROUP, DIM]
    partial,  # [B, HEADS, num_splits, QUERIES * GROUP, DIM] float32
    statistics,  # [B, HEADS, num_splits, 2, QUERIES * GROUP] float32: maximum and sum
    counters,  # [B, HEADS] int32, zero before and after; read when FUSED
    scaling,
    logit_cap,
    table_width,
    num_splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    ROTATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,  # words of a row, padded
    CAPPED: tl.constexpr,
    FUSED: tl.constexpr,  # the last split to finish combines
    LEAST_ROWS: tl.constexpr,  # of a split
    COMBINE_M: tl.constexpr,
):
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request).to(tl.int32)
    begin, end, active = split_bounds(length, num_splits, split, BLOCK_N, LEAST_ROWS)
    if split >= active:
        return
    ROWS: tl.constexpr = QUERIES * GROUP
    WORDS: tl.constexpr = DIM // 4
    QUARTER: tl.constexpr = ROTATION // 4
    HALVED: tl.constexpr = ROWS <= HALF_TILE and BLOCK_M == 2 * HALF_TILE
    SOFT_M: tl.constexpr = HALF_TILE if HALVED else BLOCK_M
    m = tl.arange(0, BLOCK_M)
    words = tl.arange(0, BLOCK_C)
    token, query_head = request * QUERIES + m // GROUP, head * GROUP + m % GROUP
    mask = (m < ROWS)[:, None] & (words < WORDS)[None, :]
    query_row = (token * (HEADS * GROUP) + query_head).to(tl.int64)
    query_at = rotated + query_row[:, None] * DIM + words[None, :]
    q0 = plane_of_query(query_at, mask, WORDS, 0)
    q1 = plane_of_query(query_at, mask, WORDS, 1)
    q2 = plane_of_query(query_at, mask, WORDS, 2)
    q3 = plane_of_query(query_at, mask, WORDS, 3)
    query_sum = (q0.to(tl.float32) + q2) + 16.0 * (q1.to(tl.float32) + q3)
    query_sum = tl.sum(query_sum, axis=1, keep_dims=True) * (1.0 / UNIT_LOW)  # [M, 1]
    query_sum = without_padding(query_sum, 1, HALVED)
    # The queries are the last rows of the view; each sees the rows up to itself.
    s = tl.arange(0, SOFT_M)
    seen = length - (QUERIES - 1 - s // GROUP)

    running_max = tl.full([SOFT_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([SOFT_M], tl.float32)
    zeros = tl.zeros([SOFT_M], tl.float32)
    a0 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    a1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    a2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    a3 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    keys_at = keys + head * WORDS + words[None, :]
    values_at = values + head * WORDS + words[None, :]
    slots_at = row_table + tl.load(rows + request).to(tl.int64) * table_width
    # Past the end the last row again, which is no garbage: its scores are left out below.
    last = tl.maximum(end - 1, 0)
    n = tl.arange(0, BLOCK_N)
    next_slot = tl.load(slots_at + tl.minimum(begin + n, last))
    for start in tl.range(begin, end, BLOCK_N):
        column = start + n
        slot = next_slot.to(tl.int64)
        quad = tl.load(scales + head + slot * HEADS)
        row = (slot * (HEADS * WORDS))[:, None]
        if BLOCK_C == WORDS:
            key_words, value_words = tl.load(keys_at + row), tl.load(values_at + row)
        else:
            in_row = tl.broadcast_to((words < WORDS)[None, :], (BLOCK_N, BLOCK_C))
            key_words = tl.load(keys_at + row, mask=in_row, other=0)
            value_words = tl.load(values_at + row, mask=in_row, other=0)
        next_slot = tl.load(slots_at + tl.minimum(column + BLOCK_N, last))
        key_words = tl.trans(key_words)
        scores = tl.dot(q0, code_plane(key_words, 0))
        scores = tl.dot(q1, code_plane(key_words, 1), scores)
        scores = tl.dot(q2, code_plane(key_words, 2), scores)
        scores = tl.dot(q3, code_plane(key_words, 3), scores)  # [M, N]
        scores = without_padding(scores, BLOCK_N, HALVED)
        # Still without the scaling and the codes' unit: one factor, which softmax multiplies by.
        scores = scores * half_at(quad, 0)[None, :] + query_sum * half_at(quad, 16)[None, :]
        unit = scaling * UNIT_LOW * LOG2_E
        if CAPPED:
            scores = to_base_2(scores * (scaling * UNIT_LOW), logit_cap, CAPPED)
            unit = 1.0
        visible = column[None, :] < seen[:, None]
        weights, shrink, running_max, running_sum = softmax_step(
            scores, unit, visible, running_max, running_sum
        )
        zeros = zeros * shrink + tl.sum(weights * half_at(quad, 48)[None, :], axis=1)
        scaled = (weights * half_at(quad, 32)[None, :]).to(tl.float16)
        scaled = with_padding(scaled, BLOCK_N, HALVED)
        shrink = with_padding(shrink[:, None], 1, HALVED)
        if HALVED:
            # The compiler drops the padding's products by 1.
            shrink = tl.where((m < HALF_TILE)[:, None], shrink, 1.0)
        a0 = tl.dot(scaled, code_plane(value_words, 0), a0 * shrink)
        a1 = tl.dot(scaled, code_plane(value_words, 1), a1 * shrink)
        a2 = tl.dot(scaled, code_plane(value_words, 2), a2 * shrink)
        a3 = tl.dot(scaled, code_plane(value_words, 3), a3 * shrink)

    place = ((request * HEADS + head) * num_splits + split).to(tl.int64) * ROWS
    dims = (words // QUARTER) * ROTATION + words % QUARTER
    at = partial + (place + m)[:, None] * DIM + dims[None, :]
    offset = with_padding(zeros[:, None], 1, HALVED)
    store_plane(a0, offset, at, mask, 0, QUARTER)
    store_plane(a1, offset, at, mask, 1, QUARTER)
    store_plane(a2, offset, at, mask, 2, QUARTER)
    store_plane(a3, offset, at, mask, 3, QUARTER)
    tl.store(statistics + 2 * place + s, running_max, mask=s < ROWS)
    tl.store(statistics + 2 * place + ROWS + s, running_sum, mask=s < ROWS)
    if FUSED:
        finish(
            partial, statistics, counters, output, request, head, active, num_splits,
            HEADS, GROUP, QUERIES, DIM, BLOCK_D, COMBINE_M, ROTATION,
        )  # fmt: skip
