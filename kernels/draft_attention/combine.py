"""Combining the splits of a view: by the last split to finish, or in a second launch.

The last split saves a launch, but it is one program: of many rows it takes longer than the splits
took, while a second launch shares them out. Both run the same code, so that one can be tested
against the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_vericache.kernels.draft_attention.softmax import split_bounds
from sglang_vericache.kernels.row_codec import rotate_rows

# Numbers of partial results that are asked for at once, and most splits that they are of: what one
# warp can hold.
AT_ONCE = tl.constexpr(4096)
MOST_AT_ONCE = tl.constexpr(8)


@triton.jit
def combine(
    partial, statistics, output, request, head, first, active, num_splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M rows of the output of one request and kv head, from row ``first`` on, from
    its ``active`` partial results.

    ROTATION: block in which the result is rotated back; 0 for none.
    """
    ROWS: tl.constexpr = QUERIES * GROUP
    m = first + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    place = ((request * HEADS + head) * num_splits).to(tl.int64) * ROWS
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Full rounds: what an unrolled loop leaves over it takes one by one, each a wait for memory.
    TOGETHER: tl.constexpr = max(1, min(MOST_AT_ONCE, AT_ONCE // (BLOCK_M * BLOCK_D)))
    rounded = tl.cdiv(active, TOGETHER) * TOGETHER
    for split in tl.range(0, rounded, loop_unroll_factor=TOGETHER):
        at = place + split * ROWS
        row_mask = (m < ROWS) & (split < active)
        mask = row_mask[:, None] & (dims < DIM)[None, :]
        # Other multiprocessors wrote these: not from this one's first-level cache.
        maximum = tl.load(
            statistics + 2 * at + m, mask=row_mask, other=float("-inf"), cache_modifier=".cg"
        )
        total = tl.load(
            statistics + 2 * at + ROWS + m, mask=row_mask, other=0.0, cache_modifier=".cg"
        )
        part = tl.load(
            partial + (at + m)[:, None] * DIM + dims[None, :],
            mask=mask,
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(running_max, maximum)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        shrink, weight = tl.exp2(running_max - shift), tl.exp2(maximum - shift)
        running_sum = running_sum * shrink + total * weight
        accumulated = accumulated * shrink[:, None] + part * weight[:, None]
        running_max = new_max
    result = accumulated / tl.where(running_sum > 0.0, running_sum, 1.0)[:, None]
    if ROTATION > 0:
        result = rotate_rows(result, BLOCK_M, BLOCK_D, ROTATION)
    token, query_head = request * QUERIES + m // GROUP, head * GROUP + m % GROUP
    at = output + ((token * (HEADS * GROUP) + query_head).to(tl.int64) * DIM)[:, None]
    mask = (m < ROWS)[:, None] & (dims < DIM)[None, :]
    tl.store(at + dims[None, :], result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def finish(
    partial, statistics, counters, output, request, head, active, num_splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """Called by every active split once its partial result is stored: the last one combines."""
    counter = counters + request * HEADS + head
    # All threads' stores come before the one thread's count, and its acquire before the loads.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == active - 1:
        tl.debug_barrier()
        combine(
            partial, statistics, output, request, head, 0, active, num_splits,
            HEADS, GROUP, QUERIES, DIM, BLOCK_D, BLOCK_M, ROTATION,
        )  # fmt: skip
        # Zero for the next launch, which the end of this one comes before.
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["num_splits"])
def combine_splits(
    partial, statistics, lengths, output, num_splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    LEAST_ROWS: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """Grid: (kv heads, blocks of rows, requests). Arguments as those of the attention kernels."""
    head, block, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request).to(tl.int32)
    _, _, active = split_bounds(length, num_splits, 0, BLOCK_N, LEAST_ROWS)
    combine(
        partial, statistics, output, request, head, block * BLOCK_M, active, num_splits,
        HEADS, GROUP, QUERIES, DIM, BLOCK_D, BLOCK_M, ROTATION,
    )  # fmt: skip
