"""Split attention over floating-point rows: bf16, fp16, fp32 and fp8.

Grid: (kv heads, splits, requests). The heads are the fastest axis: programs that run together
then read neighbouring rows of the same slots.
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
from sglang_vericache.kernels.row_codec import store_rows


@triton.jit
def append_new_rows(
    new_rows, new_slots, pool, request, head, length, begin, end, stride,
    PART: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    QUERIES_PADDED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store those of a request's new rows that lie in this program's split."""
    index = tl.arange(0, QUERIES_PADDED)
    dims = tl.arange(0, BLOCK_D)
    column = length - QUERIES + index
    mine = (index < QUERIES) & (column >= begin) & (column < end)
    token = request * QUERIES + index
    source = new_rows + (token.to(tl.int64) * stride + head * DIM)[:, None] + dims[None, :]
    rows = tl.load(source, mask=mine[:, None] & (dims < DIM)[None, :], other=0.0)
    slot = tl.load(new_slots + token, mask=mine, other=0).to(tl.int64)
    store_rows(rows, pool, pool, slot * HEADS + head, mine, PART, QUERIES_PADDED, DIM, BLOCK_D, 0)


@triton.jit
def load_rows(at, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[ROWS, BLOCK_D]`` numbers, zero from column DIM on; no mask where there are no such."""
    if BLOCK_D == DIM:
        return tl.load(at)
    in_row = tl.broadcast_to((tl.arange(0, BLOCK_D) < DIM)[None, :], (ROWS, BLOCK_D))
    return tl.load(at, mask=in_row, other=0.0)


@triton.jit(do_not_specialize=["num_splits"])
def attend_dense(
    query,  # [B * QUERIES, HEADS * GROUP, DIM], rows query_stride apart
    keys,  # [S, HEADS, DIM], one layer of the pool
    values,
    new_keys,  # [B * QUERIES, HEADS, DIM], rows new_key_stride apart; read when APPEND
    new_values,
    new_slots,  # [B * QUERIES]
    row_table,  # [R, table_width] slots
    rows,  # [B]
    lengths,  # [B]
    output,  # [B * QUERIES, HEADS * GROUP, DIM]
    partial,  # [B, HEADS, num_splits, QUERIES * GROUP, DIM] float32
    statistics,  # [B, HEADS, num_splits, 2, QUERIES * GROUP] float32: maximum and sum
    counters,  # [B, HEADS] int32, zero before and after; read when FUSED
    scaling,
    logit_cap,
    query_stride,
    new_key_stride,
    new_value_stride,
    table_width,
    num_splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERIES_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtype of the products' operands
    CAPPED: tl.constexpr,
    APPEND: tl.constexpr,
    DIRECT: tl.constexpr,  # one split: its program writes the output
    FUSED: tl.constexpr,  # the last split to finish combines
    LEAST_ROWS: tl.constexpr,  # of a split
    AHEAD: tl.constexpr,  # slots are read a block before its rows
    COMBINE_M: tl.constexpr,
):
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request).to(tl.int32)
    begin, end, active = split_bounds(length, num_splits, split, BLOCK_N, LEAST_ROWS)
    if split >= active:
        return
    if APPEND:
        append_new_rows(
            new_keys, new_slots, keys, request, head, length, begin, end, new_key_stride,
            0, HEADS, QUERIES, QUERIES_PADDED, DIM, BLOCK_D,
        )  # fmt: skip
        append_new_rows(
            new_values, new_slots, values, request, head, length, begin, end, new_value_stride,
            1, HEADS, QUERIES, QUERIES_PADDED, DIM, BLOCK_D,
        )  # fmt: skip
        # The loop reads these rows through other threads of this program, and no other does.
        tl.debug_barrier()

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token, query_head = request * QUERIES + m // GROUP, head * GROUP + m % GROUP
    in_query = (m < QUERIES * GROUP)[:, None] & (dims < DIM)[None, :]
    query_at = query + (token.to(tl.int64) * query_stride + query_head * DIM)[:, None]
    q = tl.load(query_at + dims[None, :], mask=in_query, other=0.0).to(COMPUTE)  # [M, D]
    # The queries are the last rows of the view; each sees the rows up to itself.
    seen = length - (QUERIES - 1 - m // GROUP)  # [M]

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slots_at = row_table + tl.load(rows + request).to(tl.int64) * table_width
    n = tl.arange(0, BLOCK_N)
    # Past the end the last row again: what else lies there may be not-a-number, and zero weight
    # times that is no zero.
    last = tl.maximum(end - 1, 0)
    if AHEAD:
        next_slot = tl.load(slots_at + tl.minimum(begin + n, last))
    for start in tl.range(begin, end, BLOCK_N):
        column = start + n
        if AHEAD:
            slot = next_slot.to(tl.int64)
        else:
            slot = tl.load(slots_at + tl.minimum(column, last)).to(tl.int64)
        row = ((slot * HEADS + head) * DIM)[:, None] + dims[None, :]  # [N, D]
        k = load_rows(keys + row, BLOCK_N, DIM, BLOCK_D).to(COMPUTE)
        if AHEAD:
            next_slot = tl.load(slots_at + tl.minimum(column + BLOCK_N, last))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
        # Without a cap the scaling is one factor, which softmax multiplies by.
        unit = scaling * LOG2_E
        if CAPPED:
            scores = to_base_2(scores * scaling, logit_cap, CAPPED)
            unit = 1.0
        visible = column[None, :] < seen[:, None]
        weights, shrink, running_max, running_sum = softmax_step(
            scores, unit, visible, running_max, running_sum
        )
        v = load_rows(values + row, BLOCK_N, DIM, BLOCK_D).to(COMPUTE)
        accumulated = tl.dot(
            weights.to(COMPUTE), v, accumulated * shrink[:, None], input_precision="ieee"
        )

    if DIRECT:
        total = tl.where(running_sum > 0.0, running_sum, 1.0)
        output_at = output + ((token * (HEADS * GROUP) + query_head).to(tl.int64) * DIM)[:, None]
        result = (accumulated / total[:, None]).to(output.dtype.element_ty)
        tl.store(output_at + dims[None, :], result, mask=in_query)
    else:
        ROWS: tl.constexpr = QUERIES * GROUP
        place = ((request * HEADS + head) * num_splits + split).to(tl.int64) * ROWS
        tl.store(partial + (place + m)[:, None] * DIM + dims[None, :], accumulated, mask=in_query)
        tl.store(statistics + 2 * place + m, running_max, mask=m < ROWS)
        tl.store(statistics + 2 * place + ROWS + m, running_sum, mask=m < ROWS)
        if FUSED:
            finish(
                partial, statistics, counters, output, request, head, active, num_splits,
                HEADS, GROUP, QUERIES, DIM, BLOCK_D, COMBINE_M, 0,
            )  # fmt: skip
