"""Span building for all layers in one launch.

Grid of both: (row blocks, layers, tensors of a token). A row is a picked token and head, heads
innermost, so that writes are contiguous.
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
def picked_rows(
    source_slots, picks, target_slots, layer, count,
    HEADS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Head, source slot, target slot and validity of this program's rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    index, head = row // HEADS, row % HEADS
    valid = index < count
    pick = tl.load(picks + (layer * HEADS + head) * count + index, mask=valid, other=0)
    source = tl.load(source_slots + pick, mask=valid, other=0).to(tl.int64)
    target = tl.load(target_slots + index, mask=valid, other=0).to(tl.int64)
    return head, source, target, valid


@triton.jit
def gather_part(
    pointers, source_slots, picks, target_slots, pool, scales, layer, count, slot_stride,
    PART: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ROTATION: tl.constexpr, SOURCE: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    head, source, target, valid = picked_rows(
        source_slots, picks, target_slots, layer, count, HEADS, BLOCK_ROWS
    )
    columns = tl.arange(0, BLOCK_D)
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
    do_not_specialize_on_alignment=["source_slots", "picks", "target_slots"],
)
def gather_kernel(
    key_pointers,  # [layers] int64
    value_pointers,
    source_slots,  # [T]
    picks,  # [layers, HEADS, count] int64
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
        gather_part(
            key_pointers, source_slots, picks, target_slots, pool, scales, layer, count,
            slot_stride,
            0, HEADS, DIM, BLOCK_D, BLOCK_ROWS, ROTATION, SOURCE, ALIGNMENT,
        )  # fmt: skip
    else:
        pool = pool_values + layer * pool_stride
        gather_part(
            value_pointers, source_slots, picks, target_slots, pool, scales, layer, count,
            slot_stride,
            1, HEADS, DIM, BLOCK_D, BLOCK_ROWS, ROTATION, SOURCE, ALIGNMENT,
        )  # fmt: skip


@triton.jit
def move_rows(
    tensor, source_slots, picks, target_slots, layer, count, layer_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    head, source, target, valid = picked_rows(
        source_slots, picks, target_slots, layer, count, HEADS, BLOCK_ROWS
    )
    columns = tl.arange(0, BLOCK)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    base = tensor + layer * layer_stride
    source_at = ((source * HEADS + head) * WIDTH)[:, None] + columns[None, :]
    target_at = ((target * HEADS + head) * WIDTH)[:, None] + columns[None, :]
    tl.store(base + target_at, tl.load(base + source_at, mask=mask), mask=mask)


# Slots are parts of larger tensors: a kernel for each way in which they may be aligned would be
# compiled while requests wait.
@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["source_slots", "picks", "target_slots"],
)
def regather_kernel(
    pool_keys,  # [layers, S, HEADS, WIDTH]
    pool_values,
    scales,  # [layers, S, HEADS, 4]
    source_slots,
    picks,
    target_slots,
    count,
    pool_stride,
    scales_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    if part == 0:
        move_rows(
            pool_keys, source_slots, picks, target_slots, layer, count, pool_stride,
            WIDTH, BLOCK, HEADS, BLOCK_ROWS,
        )  # fmt: skip
    elif part == 1:
        move_rows(
            pool_values, source_slots, picks, target_slots, layer, count, pool_stride,
            WIDTH, BLOCK, HEADS, BLOCK_ROWS,
        )  # fmt: skip
    if HAS_SCALES:
        if part == 2:
            move_rows(
                scales, source_slots, picks, target_slots, layer, count, scales_stride,
                4, 4, HEADS, BLOCK_ROWS,
            )  # fmt: skip


def gather_span(
    key_buffers: Sequence[torch.Tensor],
    value_buffers: Sequence[torch.Tensor],
    source_slots: torch.Tensor,
    picks: torch.Tensor,
    storage: PoolStorage,
    target_slots: torch.Tensor,
) -> None:
    """As `reference.gather_span`."""
    main = main_pool_arguments(key_buffers, value_buffers, storage)
    grid = _grid(picks, storage, 2)
    if picks.shape[2] == 0:
        return
    gather_kernel[grid](
        source_slots=source_slots,
        picks=picks.contiguous(),
        target_slots=target_slots,
        count=picks.shape[2],
        **main,
        **pool_arguments(storage),
        **LAYER_COPY,
        **EXACT,
    )


def regather_span(
    storage: PoolStorage,
    source_slots: torch.Tensor,
    picks: torch.Tensor,
    target_slots: torch.Tensor,
) -> None:
    """As `reference.regather_span`."""
    grid = _grid(picks, storage, len(storage.tensors))
    if picks.shape[2] == 0:
        return
    keys, values, scales = (storage.tensors.get(name) for name in ("keys", "values", "scales"))
    regather_kernel[grid](
        pool_keys=keys,
        pool_values=values,
        scales=scales,
        source_slots=source_slots,
        picks=picks.contiguous(),
        target_slots=target_slots,
        count=picks.shape[2],
        pool_stride=keys.stride(0),
        scales_stride=0 if scales is None else scales.stride(0),
        HEADS=storage.heads,
        WIDTH=keys.shape[3],
        BLOCK=triton.next_power_of_2(keys.shape[3]),
        HAS_SCALES=scales is not None,
        **LAYER_COPY,
    )


def _grid(picks: torch.Tensor, storage: PoolStorage, parts: int) -> tuple[int, int, int]:
    layers, heads, count = picks.shape
    if (layers, heads) != (storage.layers, storage.heads):
        raise ValueError(
            f"picks of {layers} layers and {heads} heads for a pool of {storage.layers} layers "
            f"and {storage.heads} heads"
        )
    return triton.cdiv(count * heads, LAYER_COPY["BLOCK_ROWS"]), layers, parts
