"""Split attention over four-bit rows, dequantised in registers.

With code c, scale s and zero z of a row, in the rotated basis:

    score = q . (z + s c) = s (q . c) + z sum(q)        output = sum w (z + s c) = (w s) . c + w . z

so the codes themselves are the operands of the products. A nibble masked out of its 16-bit word is
a float16 as it stands: the subnormal number code * 2^-24, or 16 times that for the nibbles at bit 4
and 12. Tensor cores take subnormals at full speed, so unpacking costs one AND for two codes, and a
word plane has the layout of any 16-bit operand: no bytes are moved between registers.

Grid: (kv heads, splits, requests), as in dense_kernel.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_vericache.kernels.draft_attention.combine import finish
from sglang_vericache.kernels.draft_attention.softmax import softmax_step, split_bounds, to_base_2
from sglang_vericache.kernels.row_codec import INTERPRETED

# What a nibble at bit 0 and at bit 4 must be multiplied by to be its code.
UNIT_LOW = tl.constexpr(2.0**24)
UNIT_HIGH = tl.constexpr(2.0**20)


@triton.jit
def code_planes(words):
    """Words -> four float16 tensors of the same shape, planes 0 and 2 of codes / UNIT_LOW, planes
    1 and 3 of codes / UNIT_HIGH."""
    if INTERPRETED:
        upper = words >> 8
        first = (words & 0x0F).to(tl.float16, bitcast=True)
        second = (words & 0xF0).to(tl.float16, bitcast=True)
        third = (upper & 0x0F).to(tl.float16, bitcast=True)
        fourth = (upper & 0xF0).to(tl.float16, bitcast=True)
    else:
        # Two words at a time; the compiler would take them apart.
        first, second, third, fourth = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 upper;
            and.b32 $0, $4, 0x000f000f;
            and.b32 $1, $4, 0x00f000f0;
            shr.u32 upper, $4, 8;
            and.b32 $2, upper, 0x000f000f;
            and.b32 $3, upper, 0x00f000f0;
            }
            """,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return first, second, third, fourth


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
    tl.store(at + PLANE * QUARTER, accumulated * unit + zeros[:, None], mask=mask)


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
    COMBINE_M: tl.constexpr,
):
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request).to(tl.int32)
    begin, end, active = split_bounds(length, num_splits, split, BLOCK_N)
    if split >= active:
        return
    ROWS: tl.constexpr = QUERIES * GROUP
    WORDS: tl.constexpr = DIM // 4
    QUARTER: tl.constexpr = ROTATION // 4
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
    query_sum = tl.sum((q0.to(tl.float32) + q2) + 16.0 * (q1.to(tl.float32) + q3), axis=1)
    # The queries are the last rows of the view; each sees the rows up to itself.
    seen = length - (QUERIES - 1 - m // GROUP)  # [M]

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    zeros = tl.zeros([BLOCK_M], tl.float32)
    a0 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    a1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    a2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    a3 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    slots_at = row_table + tl.load(rows + request).to(tl.int64) * table_width
    for start in tl.range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < end
        slot = tl.load(slots_at + column, mask=inside, other=0).to(tl.int64)
        row = slot * HEADS + head
        # Rows past the end may hold anything; all zeros is a row of value 0.
        quad = tl.load(scales + row, mask=inside, other=0)
        words_at = row[:, None] * WORDS + words[None, :]
        in_row = inside[:, None] & (words < WORDS)[None, :]
        k0, k1, k2, k3 = code_planes(tl.load(keys + words_at, mask=in_row, other=0))
        scores = tl.dot(q0, tl.trans(k0))
        scores = tl.dot(q1, tl.trans(k1), scores)
        scores = tl.dot(q2, tl.trans(k2), scores)
        scores = tl.dot(q3, tl.trans(k3), scores)  # [M, N]
        key_scale = half_at(quad, 0) * (scaling * UNIT_LOW)
        key_zero = half_at(quad, 16) * scaling
        scores = scores * key_scale[None, :] + query_sum[:, None] * key_zero[None, :]
        scores = to_base_2(scores, logit_cap, CAPPED)
        visible = column[None, :] < seen[:, None]
        weights, shrink, running_max, running_sum = softmax_step(
            scores, visible, running_max, running_sum
        )
        v0, v1, v2, v3 = code_planes(tl.load(values + words_at, mask=in_row, other=0))
        scaled = (weights * half_at(quad, 32)[None, :]).to(tl.float16)
        a0 = tl.dot(scaled, v0, a0 * shrink[:, None])
        a1 = tl.dot(scaled, v1, a1 * shrink[:, None])
        a2 = tl.dot(scaled, v2, a2 * shrink[:, None])
        a3 = tl.dot(scaled, v3, a3 * shrink[:, None])
        zeros = zeros * shrink + tl.sum(weights * half_at(quad, 48)[None, :], axis=1)

    place = ((request * HEADS + head) * num_splits + split).to(tl.int64) * ROWS
    dims = (words // QUARTER) * ROTATION + words % QUARTER
    at = partial + (place + m)[:, None] * DIM + dims[None, :]
    store_plane(a0, zeros, at, mask, 0, QUARTER)
    store_plane(a1, zeros, at, mask, 1, QUARTER)
    store_plane(a2, zeros, at, mask, 2, QUARTER)
    store_plane(a3, zeros, at, mask, 3, QUARTER)
    tl.store(statistics + 2 * place + m, running_max, mask=m < ROWS)
    tl.store(statistics + 2 * place + ROWS + m, running_sum, mask=m < ROWS)
    if FUSED:
        finish(
            partial, statistics, counters, output, request, head, active, num_splits,
            HEADS, GROUP, QUERIES, DIM, BLOCK_D, COMBINE_M, ROTATION,
        )  # fmt: skip
