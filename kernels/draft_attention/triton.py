"""Draft attention on the GPU: split over the rows of a view, nothing planned on the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vericache.kernels.append_rows.triton import (
    append_and_rotate,
    rotate_queries,
    token_stride,
)
from sglang_vericache.kernels.draft_attention.combine import combine_splits
from sglang_vericache.kernels.draft_attention.config import (
    LEAST_SPLIT_ROWS,
    TENSOR_CORE_ROWS,
    AttentionConfig,
    config_of,
    kind_of,
    multiprocessors,
    split_count,
)
from sglang_vericache.kernels.draft_attention.dense_kernel import attend_dense
from sglang_vericache.kernels.draft_attention.int4_kernel import attend_int4
from sglang_vericache.kernels.draft_attention.workspace import Workspace
from sglang_vericache.kernels.pool_format import PoolStorage
from sglang_vericache.kernels.row_codec import INTERPRETED, TRITON_DTYPES, rotation_of, typed

LEAST_D = 16  # what tensor cores take at a time
# Of the launch that combines: rows of a program, few so that the results of many splits are asked
# for at once, and there are many programs.
SHARED_ROWS, COMBINE_WARPS = 4, 2


def draft_attention(
    query: torch.Tensor,
    storage: PoolStorage,
    layer: int,
    row_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    logit_cap: float = 0.0,
    workspace: Workspace | None = None,
    config: AttentionConfig | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """As `reference.draft_attention`, without reading anything back: graphs can be captured.

    Args:
        workspace: see there; one launch fewer where few rows are combined.
        config: in place of the table's.
        num_splits: in place of the count derived from the batch and the table's width, however few
            rows each of them has.
    """
    view = (row_table, rows, lengths)
    return _attend(
        query, None, storage, layer, view, scaling, logit_cap, workspace, config, num_splits
    )


def append_and_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    storage: PoolStorage,
    layer: int,
    row_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    logit_cap: float = 0.0,
    workspace: Workspace | None = None,
    config: AttentionConfig | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """As `reference.append_and_attend`; further arguments as for `draft_attention`.

    Floating-point pools: one launch, the program that reads the new rows writes them first. int4:
    two, because every split wants the rotated query; the first launch rotates it beside the new
    keys and values.
    """
    view = (row_table, rows, lengths)
    new = (keys, values, slots)
    return _attend(
        query, new, storage, layer, view, scaling, logit_cap, workspace, config, num_splits
    )


def _attend(
    query, new, storage, layer, view, scaling, logit_cap, workspace, config, num_splits
) -> torch.Tensor:
    batch, queries, query_heads, dim = query.shape
    group, rest = divmod(query_heads, storage.heads)
    if rest or dim != storage.head_dim:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit a pool of {storage.heads} heads of "
            f"{storage.head_dim}"
        )
    row_table, rows, lengths = view
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if batch == 0:
        return output
    pairs, per_pair = batch * storage.heads, queries * group
    config = config or config_of(storage, per_pair)
    least_rows = 0
    if num_splits is None:
        processors = multiprocessors(query.device)
        num_splits = split_count(config, batch, storage.heads, row_table.shape[1], processors)
        least_rows = LEAST_SPLIT_ROWS
    int4 = kind_of(storage) == "int4"
    direct = num_splits == 1 and not int4
    fused = workspace is not None and not direct and per_pair <= TENSOR_CORE_ROWS
    partial = statistics = counters = None
    if not direct:
        partial_rows = pairs * num_splits * per_pair
        memory = workspace or Workspace(0, partial_rows, dim, query.device)
        memory.check(pairs if fused else 0, partial_rows, dim)
        partial, statistics = memory.partial, memory.statistics
        counters = memory.counters if fused else None
    shared = dict(
        row_table=row_table,
        rows=rows,
        lengths=lengths,
        output=output,
        partial=partial,
        statistics=statistics,
        counters=counters,
        scaling=scaling,
        logit_cap=logit_cap,
        table_width=row_table.stride(0),
        num_splits=num_splits,
        HEADS=storage.heads,
        GROUP=group,
        QUERIES=queries,
        DIM=dim,
        BLOCK_M=max(TENSOR_CORE_ROWS, triton.next_power_of_2(per_pair)),
        BLOCK_N=config.block_n,
        BLOCK_D=max(LEAST_D, triton.next_power_of_2(dim)),
        CAPPED=logit_cap > 0.0,
        FUSED=fused,
        LEAST_ROWS=least_rows,
        COMBINE_M=triton.next_power_of_2(per_pair if fused else min(per_pair, SHARED_ROWS)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    grid = (storage.heads, num_splits, batch)
    if int4:
        _launch_int4(grid, query, new, storage, layer, shared)
    else:
        _launch_dense(grid, query, new, storage, layer, direct, config.ahead, shared)
    if not (direct or fused):
        blocks = triton.cdiv(per_pair, shared["COMBINE_M"])
        combine_splits[(storage.heads, blocks, batch)](
            partial,
            statistics,
            lengths,
            output,
            num_splits,
            ROTATION=rotation_of(storage),
            **{
                name: shared[name]
                for name in ("HEADS", "GROUP", "QUERIES", "DIM", "BLOCK_N", "BLOCK_D", "LEAST_ROWS")
            },
            BLOCK_M=shared["COMBINE_M"],
            num_warps=COMBINE_WARPS,
        )
    return output


def _launch_dense(grid, query, new, storage, layer, direct: bool, ahead: bool, shared) -> None:
    keys, values, slots = new or (None, None, None)
    pool = [typed(storage.tensors[part][layer]) for part in ("keys", "values")]
    # e4m3 numbers are float16 numbers; the way to bf16 is longer.
    compute = TRITON_DTYPES.get(pool[0].dtype, tl.float16)
    if INTERPRETED and compute == tl.bfloat16:
        compute = tl.float32  # the interpreter multiplies bf16 as if they were integers
    attend_dense[grid](
        query=query,
        keys=pool[0],
        values=pool[1],
        new_keys=keys,
        new_values=values,
        new_slots=slots,
        query_stride=token_stride(query),
        new_key_stride=0 if new is None else token_stride(keys),
        new_value_stride=0 if new is None else token_stride(values),
        QUERIES_PADDED=triton.next_power_of_2(query.shape[1]),
        COMPUTE=compute,
        APPEND=new is not None,
        DIRECT=direct,
        AHEAD=ahead,
        **shared,
    )


def _launch_int4(grid, query, new, storage, layer, shared) -> None:
    if new is None:
        rotated = rotate_queries(query, storage)
    else:
        keys, values, slots = new
        rotated = append_and_rotate(keys, values, slots, query, storage, layer)
    attend_int4[grid](
        rotated=rotated,
        keys=storage.tensors["keys"][layer],
        values=storage.tensors["values"][layer],
        scales=storage.tensors["scales"][layer].view(torch.int64),
        ROTATION=rotation_of(storage),
        BLOCK_C=max(LEAST_D, triton.next_power_of_2(query.shape[-1] // 4)),
        **shared,
    )
