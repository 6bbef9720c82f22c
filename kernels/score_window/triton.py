"""Window scores of all layers in three launches, without storing any logits.

1. `window_statistics`, grid (row blocks, splits, layers * kv heads): maximum and sum of the softmax
   of each query row over one split of the tokens.
2. `window_logs`, grid (row blocks, layers * kv heads): combines the splits.
3. `window_mass`, grid (row blocks, splits, layers * kv heads): adds the weights of a block's query
   rows up.

A query row is a query and a query head of the kv head's group. How many there are is no constant of
the kernels: windows of all lengths come, and each would be compiled while requests wait.

An exponential takes as long as its part of the product, so that nothing else may be done for each
number: no masks but in the last tokens of a split that are not a whole block or not seen by all,
and as many rows at a time as fill two programs a multiprocessor, so that the keys are read twice in
all and one program multiplies while the other takes exponentials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_vericache.kernels.all_layers import layer_buffer
from sglang_vericache.kernels.draft_attention.config import multiprocessors
from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.row_codec import INTERPRETED, TRITON_DTYPES

LOG2_E = tl.constexpr(1.4426950408889634)
NO_POSITION = tl.constexpr(2**31 - 2)
LEAST_DIM = 16  # what tensor cores take at a time
# Tokens at a time where not all are seen: few, so that masks do not take the registers of two
# programs.
TAIL_N = 32
LEAST_SPLIT_TOKENS = 1024
PROGRAMS_PER_MULTIPROCESSOR = 8  # in all; two run at a time
MOST_SPLITS = 64
LOGS_BLOCK = 128
# Queries of a usual window. Shorter ones take the blocks of `FEW_ROWS` or fill theirs in part.
USUAL_WINDOW = 64


@dataclass(frozen=True)
class Blocks:
    """Query rows and tokens that a program holds at a time."""

    rows: int
    tokens: int
    num_warps: int


FEW_ROWS = Blocks(32, 128, 4)
MANY_ROWS = (Blocks(64, 128, 4), Blocks(128, 64, 4), Blocks(256, 64, 8))
# float32 has no tensor cores that round as rarely as it does: products are sums in registers.
FLOAT32_ROWS = Blocks(32, 64, 4)


def blocks_for(rows: int, group: int, dim: int, dtype: torch.dtype) -> Blocks:
    """How ``rows`` query rows are split: two choices a model, both of which a warm-up can reach."""
    if dtype == torch.float32:
        return FLOAT32_ROWS
    if rows <= FEW_ROWS.rows:
        return FEW_ROWS
    most = 256 if dim <= 128 else 128  # rows of 256 dimensions fill shared memory
    wanted = min(USUAL_WINDOW * group, most)
    return next(blocks for blocks in MANY_ROWS if blocks.rows >= wanted)


@triton.jit
def window_rows(
    queries, query_positions, layer, head, block, window, query_stride, layer_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, QUERY_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Queries ``[M, D]`` and path positions ``[M]`` of a block of query rows.

    Rows past the end are zero and stand behind all tokens.
    """
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    valid = row < window * GROUP
    index, query_head = row // GROUP, head * GROUP + row % GROUP
    # A hint on an argument itself is lost.
    queries = tl.multiple_of(queries + layer * layer_stride, QUERY_ALIGNMENT)
    at = queries + (index * query_stride + query_head * DIM)[:, None]
    mask = valid[:, None] & (dims < DIM)[None, :]
    q = tl.load(at + dims[None, :], mask=mask, other=0.0).to(COMPUTE)
    positions = tl.load(query_positions + index, mask=valid, other=NO_POSITION)
    return q, positions.to(tl.int32)


@triton.jit
def token_keys(
    buffer, slots, token, count, head, slot_stride,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Keys ``[N, D]`` of some tokens of the path; ALL of them exist, or zeros stand in."""
    dims = tl.arange(0, BLOCK_D)
    if ALL:
        slot = tl.load(slots + token).to(tl.int64)
        mask = tl.broadcast_to((dims < DIM)[None, :], (token.shape[0], BLOCK_D))
    else:
        slot = tl.load(slots + token, mask=token < count, other=0).to(tl.int64)
        mask = (token < count)[:, None] & (dims < DIM)[None, :]
    at = buffer + (slot * slot_stride + head * DIM)[:, None] + dims[None, :]
    return tl.load(at, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def tail_scores(q, k, positions, token, count, start, unit):
    """Scores ``[M, N]`` in base 2, -inf where the query does not see the token."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * unit
    seen = (token[None, :] < count) & (token[None, :] + start <= positions[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def end_of_whole_blocks(positions, begin, end, start, BLOCK_N: tl.constexpr):
    """Where the blocks from ``begin`` on end whose tokens all rows see."""
    seen = tl.min(positions, axis=0) - start + 1
    return begin + tl.maximum(tl.minimum(end, seen) - begin, 0) // BLOCK_N * BLOCK_N


@triton.jit(
    do_not_specialize=["window", "count", "start", "per_split", "splits"],
    do_not_specialize_on_alignment=["queries", "query_positions", "slots"],
)
def window_statistics(
    queries,  # [layers, window, HEADS * GROUP, DIM], strides layer_stride and query_stride
    query_positions,  # [window]
    pointers,  # [layers] int64, key buffers
    slots,  # [count]
    statistics,  # [layers, HEADS, splits, 2, window * GROUP] float32: maximum and sum
    window,
    count,
    start,
    scaling,
    per_split,  # tokens of a split, a multiple of BLOCK_N
    splits,
    layer_stride,
    query_stride,
    slot_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOURCE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    QUERY_ALIGNMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    block, split, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer, head = (pair // HEADS).to(tl.int64), pair % HEADS
    q, positions = window_rows(
        queries, query_positions, layer, head, block, window, query_stride, layer_stride,
        GROUP, DIM, BLOCK_M, BLOCK_D, COMPUTE, QUERY_ALIGNMENT,
    )  # fmt: skip
    buffer = layer_buffer(pointers, layer, SOURCE, ALIGNMENT)
    unit = scaling * LOG2_E
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    begin = split * per_split
    end = tl.minimum(begin + per_split, count)
    whole = end_of_whole_blocks(positions, begin, end, start, BLOCK_N)
    for first in tl.range(begin, whole, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        k = token_keys(buffer, slots, token, count, head, slot_stride, DIM, BLOCK_D, COMPUTE, True)
        # Not yet scaled: that is part of the subtraction.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        new_max = tl.maximum(running_max, tl.max(scores, axis=1) * unit)
        running_sum *= tl.exp2(running_max - new_max)
        running_sum += tl.sum(tl.exp2(scores * unit - new_max[:, None]), axis=1)
        running_max = new_max
    for first in tl.range(whole, end, TAIL_N, num_stages=1):
        token = first + tl.arange(0, TAIL_N)
        k = token_keys(buffer, slots, token, count, head, slot_stride, DIM, BLOCK_D, COMPUTE, False)
        scores = tail_scores(q, k, positions, token, count, start, unit)
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is no number.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum *= tl.exp2(running_max - shift)
        running_sum += tl.sum(tl.exp2(scores - shift[:, None]), axis=1)
        running_max = new_max
    rows = window * GROUP
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    at = statistics + (pair * splits + split).to(tl.int64) * (2 * rows) + row
    tl.store(at, running_max, mask=row < rows)
    tl.store(at + rows, running_sum, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "splits"])
def window_logs(
    statistics,
    logs,  # [layers, HEADS, rows] float32: base-2 logarithm of each softmax sum
    rows,
    splits,
    BLOCK_M: tl.constexpr,
):
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    for split in tl.range(0, splits):
        at = statistics + (pair * splits + split) * (2 * rows) + row
        new = tl.load(at, mask=row < rows, other=float("-inf"))
        part = tl.load(at + rows, mask=row < rows, other=0.0)
        new_max = tl.maximum(running_max, new)
        # A row that sees nothing has the maximum -inf, and -inf - -inf is no number.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp2(running_max - shift) + part * tl.exp2(new - shift)
        running_max = new_max
    shift = tl.where(running_max == float("-inf"), 0.0, running_max)
    # 0 for rows that see nothing.
    found = shift + tl.log2(tl.where(running_sum > 0.0, running_sum, 1.0))
    tl.store(logs + pair * rows + row, found, mask=row < rows)


@triton.jit(
    do_not_specialize=["window", "count", "start", "per_split"],
    do_not_specialize_on_alignment=["queries", "query_positions", "slots"],
)
def window_mass(
    queries,
    query_positions,
    pointers,
    slots,
    logs,
    mass,  # [row blocks, layers, HEADS, count] float32: of the rows of a block
    window,
    count,
    start,
    scaling,
    per_split,
    layer_stride,
    query_stride,
    slot_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOURCE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    QUERY_ALIGNMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    block, split, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer, head = (pair // HEADS).to(tl.int64), pair % HEADS
    rows = window * GROUP
    q, positions = window_rows(
        queries, query_positions, layer, head, block, window, query_stride, layer_stride,
        GROUP, DIM, BLOCK_M, BLOCK_D, COMPUTE, QUERY_ALIGNMENT,
    )  # fmt: skip
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end have no weight.
    sums = tl.load(logs + pair.to(tl.int64) * rows + row, mask=row < rows, other=float("inf"))
    buffer = layer_buffer(pointers, layer, SOURCE, ALIGNMENT)
    unit, share = scaling * LOG2_E, 1.0 / rows
    begin = split * per_split
    end = tl.minimum(begin + per_split, count)
    whole = end_of_whole_blocks(positions, begin, end, start, BLOCK_N)
    target = mass + (block * tl.num_programs(2) + pair).to(tl.int64) * count
    for first in tl.range(begin, whole, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        k = token_keys(buffer, slots, token, count, head, slot_stride, DIM, BLOCK_D, COMPUTE, True)
        # Tokens first, so that the rows of a token lie in one thread or a few.
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        total = tl.sum(tl.exp2(scores * unit - sums[None, :]), axis=1)
        tl.store(target + token, total * share)
    for first in tl.range(whole, end, TAIL_N, num_stages=1):
        token = first + tl.arange(0, TAIL_N)
        k = token_keys(buffer, slots, token, count, head, slot_stride, DIM, BLOCK_D, COMPUTE, False)
        scores = tail_scores(q, k, positions, token, count, start, unit)
        total = tl.sum(tl.exp2(scores - sums[:, None]), axis=0)
        tl.store(target + token, total * share, mask=token < count)


def score_window(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    key_buffers: Sequence[torch.Tensor],
    slots: torch.Tensor,
    start: int,
    scaling: float,
    splits: int | None = None,
) -> torch.Tensor:
    """As `reference.score_window`.

    Args:
        scaling: positive.
        splits: in place of the count derived from the shapes.
    """
    layers, window, query_heads, dim = queries.shape
    buffers = LayerBuffers.of(key_buffers)
    heads, tokens = buffers[0].shape[1], slots.shape[0]
    group, rest = divmod(query_heads, heads)
    if rest or dim != buffers[0].shape[2] or len(buffers) != layers:
        raise ValueError(
            f"queries {tuple(queries.shape)} do not fit {len(buffers)} key buffers "
            f"{tuple(buffers[0].shape)}"
        )
    rows, pairs = window * group, layers * heads
    blocks = blocks_for(rows, group, dim, buffers[0].dtype)
    row_blocks = triton.cdiv(rows, blocks.rows)
    mass = _numbers(queries, row_blocks, layers, heads, tokens)
    if tokens == 0 or layers == 0:
        return mass.sum(0)
    if queries.stride()[2:] != (dim, 1):
        queries = queries.contiguous()
    if splits is None:
        wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(queries.device)
        splits = triton.cdiv(wanted, row_blocks * pairs)
        splits = max(1, min(splits, tokens // LEAST_SPLIT_TOKENS, MOST_SPLITS))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), blocks.tokens) * blocks.tokens
    splits = triton.cdiv(tokens, per_split)
    source = TRITON_DTYPES[buffers[0].dtype]
    shared = dict(
        queries=queries,
        query_positions=query_positions,
        pointers=buffers.pointers,
        slots=slots,
        window=window,
        count=tokens,
        start=start,
        scaling=scaling,
        per_split=per_split,
        layer_stride=queries.stride(0),
        query_stride=queries.stride(1),
        slot_stride=buffers.slot_stride,
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        BLOCK_M=blocks.rows,
        BLOCK_N=blocks.tokens,
        TAIL_N=TAIL_N,
        BLOCK_D=max(LEAST_DIM, triton.next_power_of_2(dim)),
        SOURCE=source,
        ALIGNMENT=buffers.alignment,
        QUERY_ALIGNMENT=_alignment(queries),
        # The interpreter multiplies bf16 as if they were integers.
        COMPUTE=tl.float32 if INTERPRETED else source,
        num_warps=blocks.num_warps,
        num_stages=3,
    )
    statistics = _numbers(queries, layers, heads, splits, 2, rows)
    logs = _numbers(queries, layers, heads, rows)
    grid = row_blocks, splits, pairs
    window_statistics[grid](statistics=statistics, splits=splits, **shared)
    window_logs[(triton.cdiv(rows, LOGS_BLOCK), pairs)](
        statistics, logs, rows, splits, BLOCK_M=LOGS_BLOCK
    )
    window_mass[grid](logs=logs, mass=mass, **shared)
    return mass[0] if row_blocks == 1 else mass.sum(0)


def _numbers(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _alignment(queries: torch.Tensor) -> int:
    """Bytes that divide the address of every layer's queries, at most 16: nearly always 16,
    because parts of a prefill's queries begin with a whole query."""
    layers = queries.data_ptr() | queries.stride(0) * queries.itemsize
    return min(16, layers & -layers)
