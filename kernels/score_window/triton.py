"""Window scores of all layers in three launches, without storing any logits.

1. `window_statistics`, grid (row blocks, splits, layers * kv heads): maximum and sum of the softmax
   of each query row over one split of the tokens.
2. `window_logs`, grid (row blocks, layers * kv heads): combines the splits.
3. `window_mass`, grid (token blocks, layers * kv heads): adds the weights of all query rows up, a
   block of tokens at a time.

A query row is a query and a query head of the kv head's group. How many there are is no constant of
the kernels: windows of all lengths come, and each would be compiled while requests wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sglang_vericache.kernels.all_layers import layer_buffer
from sglang_vericache.kernels.draft_attention.config import multiprocessors
from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.row_codec import INTERPRETED, TRITON_DTYPES

LOG2_E = tl.constexpr(1.4426950408889634)
# Query rows at a time: few for the windows that short turns leave.
ROW_BLOCKS = (32, 128)
LEAST_DIM = 16  # what tensor cores take at a time
BLOCK_N = 128
WIDE_BLOCK_N = 64  # for head_dim above 128
LEAST_SPLIT_TOKENS = 1024
ROUNDS_OF_PROGRAMS = 2
MOST_SPLITS = 64


@triton.jit
def window_rows(
    queries, query_positions, layer, head, block, window, query_stride, layer_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Queries ``[M, D]`` and path positions ``[M]`` of a block of query rows; -1 pads."""
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    valid = row < window * GROUP
    index, query_head = row // GROUP, head * GROUP + row % GROUP
    at = queries + layer * layer_stride + (index * query_stride + query_head * DIM)[:, None]
    mask = valid[:, None] & (dims < DIM)[None, :]
    q = tl.load(at + dims[None, :], mask=mask, other=0.0).to(COMPUTE)
    return q, tl.load(query_positions + index, mask=valid, other=-1).to(tl.int32)


@triton.jit
def token_keys(
    buffer, slots, token, count, head, slot_stride,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Keys ``[N, D]`` of some tokens of the path."""
    dims = tl.arange(0, BLOCK_D)
    slot = tl.load(slots + token, mask=token < count, other=0).to(tl.int64)
    at = buffer + (slot * slot_stride + head * DIM)[:, None] + dims[None, :]
    mask = (token < count)[:, None] & (dims < DIM)[None, :]
    return tl.load(at, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def window_scores(q, k, positions, token, count, start, scaling):
    """Scores ``[M, N]`` in base 2, -inf where the query does not see the token."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scaling * LOG2_E)
    seen = (token[None, :] < count) & (token[None, :] + start <= positions[:, None])
    return tl.where(seen, scores, float("-inf"))


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
    BLOCK_D: tl.constexpr,
    SOURCE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    block, split, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer, head = (pair // HEADS).to(tl.int64), pair % HEADS
    q, positions = window_rows(
        queries, query_positions, layer, head, block, window, query_stride, layer_stride,
        GROUP, DIM, BLOCK_M, BLOCK_D, COMPUTE,
    )  # fmt: skip
    buffer = layer_buffer(pointers, layer, SOURCE, ALIGNMENT)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum((split + 1) * per_split, count)
    for first in tl.range(split * per_split, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        k = token_keys(buffer, slots, token, count, head, slot_stride, DIM, BLOCK_D, COMPUTE)
        scores = window_scores(q, k, positions, token, count, start, scaling)
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is no number.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp2(running_max - shift)
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
    do_not_specialize=["window", "count", "start"],
    do_not_specialize_on_alignment=["queries", "query_positions", "slots"],
)
def window_mass(
    queries,
    query_positions,
    pointers,
    slots,
    logs,
    mass,  # [layers, HEADS, count] float32
    window,
    count,
    start,
    scaling,
    layer_stride,
    query_stride,
    slot_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOURCE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    pair = tl.program_id(1)
    layer, head = (pair // HEADS).to(tl.int64), pair % HEADS
    rows = window * GROUP
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    buffer = layer_buffer(pointers, layer, SOURCE, ALIGNMENT)
    k = token_keys(buffer, slots, token, count, head, slot_stride, DIM, BLOCK_D, COMPUTE)
    total = tl.zeros([BLOCK_N], tl.float32)
    for block in tl.range(0, tl.cdiv(rows, BLOCK_M)):
        q, positions = window_rows(
            queries, query_positions, layer, head, block, window, query_stride, layer_stride,
            GROUP, DIM, BLOCK_M, BLOCK_D, COMPUTE,
        )  # fmt: skip
        scores = window_scores(q, k, positions, token, count, start, scaling)
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        # Scores of rows past the end are -inf.
        sums = tl.load(logs + pair.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
        total += tl.sum(tl.exp2(scores - sums[:, None]), axis=0)
    tl.store(mass + pair.to(tl.int64) * count + token, total / rows, mask=token < count)


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
    mass = torch.empty((layers, heads, tokens), dtype=torch.float32, device=queries.device)
    if tokens == 0 or layers == 0:
        return mass
    if queries.stride()[2:] != (dim, 1):
        queries = queries.contiguous()
    rows = window * group
    block_m = next((size for size in ROW_BLOCKS if rows <= size), ROW_BLOCKS[-1])
    block_n = BLOCK_N if dim <= 128 else WIDE_BLOCK_N
    row_blocks = triton.cdiv(rows, block_m)
    if splits is None:
        wanted = ROUNDS_OF_PROGRAMS * multiprocessors(queries.device)
        splits = triton.cdiv(wanted, row_blocks * layers * heads)
        splits = max(1, min(splits, tokens // LEAST_SPLIT_TOKENS, MOST_SPLITS))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), block_n) * block_n
    splits = triton.cdiv(tokens, per_split)
    statistics = torch.empty(
        (layers, heads, splits, 2, rows), dtype=torch.float32, device=queries.device
    )
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
        layer_stride=queries.stride(0),
        query_stride=queries.stride(1),
        slot_stride=buffers.slot_stride,
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(LEAST_DIM, triton.next_power_of_2(dim)),
        SOURCE=source,
        ALIGNMENT=buffers.alignment,
        # The interpreter multiplies bf16 as if they were integers.
        COMPUTE=tl.float32 if INTERPRETED else source,
        num_warps=8 if block_m == ROW_BLOCKS[-1] else 4,
    )
    logs = torch.empty((layers, heads, rows), dtype=torch.float32, device=queries.device)
    window_statistics[(row_blocks, splits, layers * heads)](
        statistics=statistics, per_split=per_split, splits=splits, num_stages=3, **shared
    )
    window_logs[(row_blocks, layers * heads)](statistics, logs, rows, splits, BLOCK_M=block_m)
    window_mass[(triton.cdiv(tokens, block_n), layers * heads)](
        logs=logs, mass=mass, num_stages=1, **shared
    )
    return mass
