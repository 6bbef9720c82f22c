"""Commit of all layers in one launch.

Grid: (row blocks, layers, keys and values). A row is a token and head, heads innermost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sglang_vericache.kernels.all_layers import (
    LAYER_COPY,
    layer_buffer,
    main_pool_arguments,
    pool_arguments,
)
from sglang_vericache.kernels.pool_format import PoolStorage
from sglang_vericache.kernels.row_codec import EXACT, store_rows


@triton.jit
def commit_part(
    pointers, source_slots, target_slots, pool, scales, layer, count, slot_stride,
    PART: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ROTATION: tl.constexpr, SOURCE: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_D)
    token, head = row // HEADS, row % HEADS
    target = tl.load(target_slots + token, mask=token < count, other=0).to(tl.int64)
    # Slot 0 drops a token.
    valid = (token < count) & (target != 0)
    source = tl.load(source_slots + token, mask=valid, other=0).to(tl.int64)
    source_at = (source * slot_stride + head * DIM)[:, None] + columns[None, :]
    buffer = layer_buffer(pointers, layer, SOURCE, ALIGNMENT)
    mask = valid[:, None] & (columns < DIM)[None, :]
    rows = tl.load(buffer + source_at, mask=mask, other=0.0)
    place = target * HEADS + head
    store_rows(rows, pool, scales, place, valid, PART, BLOCK_ROWS, DIM, BLOCK_D, ROTATION)


# Slots are parts of larger tensors: a kernel for each way in which they may be aligned would be
# compiled while requests wait.
@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["source_slots", "target_slots"],
)
def commit_kernel(
    key_pointers,  # [layers] int64
    value_pointers,
    source_slots,  # [count]
    target_slots,  # [count]
    pool_keys,  # [layers, S, HEADS, ...]
    pool_values,
    scales,
    count,
    slot_stride,  # of a layer's buffer
    pool_stride,  # of a layer of the pool
    scales_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROTATION: tl.constexpr,
    SOURCE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    if ROTATION > 0:
        scales += layer * scales_stride
    if tl.program_id(2) == 0:
        pool = pool_keys + layer * pool_stride
        commit_part(
            key_pointers, source_slots, target_slots, pool, scales, layer, count, slot_stride,
            0, HEADS, DIM, BLOCK_D, BLOCK_ROWS, ROTATION, SOURCE, ALIGNMENT,
        )  # fmt: skip
    else:
        pool = pool_values + layer * pool_stride
        commit_part(
            value_pointers, source_slots, target_slots, pool, scales, layer, count, slot_stride,
            1, HEADS, DIM, BLOCK_D, BLOCK_ROWS, ROTATION, SOURCE, ALIGNMENT,
        )  # fmt: skip


def commit_rows(
    key_buffers: Sequence[torch.Tensor],
    value_buffers: Sequence[torch.Tensor],
    source_slots: torch.Tensor,
    storage: PoolStorage,
    target_slots: torch.Tensor,
) -> None:
    """As `reference.commit_rows`."""
    count = source_slots.numel()
    main = main_pool_arguments(key_buffers, value_buffers, storage)
    if count == 0:
        return
    row_blocks = triton.cdiv(count * storage.heads, LAYER_COPY["BLOCK_ROWS"])
    commit_kernel[(row_blocks, storage.layers, 2)](
        source_slots=source_slots,
        target_slots=target_slots,
        count=count,
        **main,
        **pool_arguments(storage),
        **LAYER_COPY,
        **EXACT,
    )
