"""Append in one launch; for an int4 pool the same launch can rotate the queries.

Grid: row blocks of the keys, then of the values, then of the queries. A row is a token and head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vericache.kernels.pool_format import PoolStorage
from sglang_vericache.kernels.row_codec import EXACT, rotate_rows, rotation_of, store_rows, typed

# Small, because a draft step has one token a request: 256 requests of 3 heads are 96 programs.
BLOCK_ROWS = 8
NUM_WARPS = 1


@triton.jit
def append_part(
    new_rows, slots, pool, scales, block, tokens, stride,
    PART: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_D)
    token, head = row // HEADS, row % HEADS
    valid = token < tokens
    mask = valid[:, None] & (columns < DIM)[None, :]
    source = new_rows + (token.to(tl.int64) * stride + head * DIM)[:, None] + columns[None, :]
    rows = tl.load(source, mask=mask, other=0.0)
    slot = tl.load(slots + token, mask=valid, other=0).to(tl.int64)
    place = slot * HEADS + head
    store_rows(rows, pool, scales, place, valid, PART, BLOCK_ROWS, DIM, BLOCK_D, ROTATION)


@triton.jit
def rotate_queries_part(
    query, rotated, block, tokens, stride,
    QUERY_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_D)
    token, head = row // QUERY_HEADS, row % QUERY_HEADS
    mask = (token < tokens)[:, None] & (columns < DIM)[None, :]
    source = query + (token.to(tl.int64) * stride + head * DIM)[:, None] + columns[None, :]
    rows = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    rows = rotate_rows(rows, BLOCK_ROWS, BLOCK_D, ROTATION)
    # Nibble planes one after the other, as attention reads them.
    QUARTER: tl.constexpr = ROTATION // 4
    within = columns % ROTATION
    plane = within // QUARTER
    place = plane * (DIM // 4) + (columns // ROTATION) * QUARTER + within % QUARTER
    target = rotated + row.to(tl.int64)[:, None] * DIM + place[None, :]
    tl.store(target, rows.to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["tokens", "row_blocks", "query_tokens"])
def append_kernel(
    keys,  # [tokens, HEADS, DIM], rows key_stride apart
    values,
    slots,  # [tokens]
    pool_keys,  # [S, HEADS, ...], one layer
    pool_values,
    scales,
    query,  # [query_tokens, QUERY_HEADS, DIM], rows query_stride apart
    rotated,  # [query_tokens, QUERY_HEADS, DIM] float16
    tokens,
    query_tokens,
    row_blocks,
    key_stride,
    value_stride,
    query_stride,
    HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    APPEND: tl.constexpr,
    ROTATE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROTATION: tl.constexpr,
):
    block = tl.program_id(0)
    if APPEND:
        if block < row_blocks:
            append_part(
                keys, slots, pool_keys, scales, block, tokens, key_stride,
                0, HEADS, DIM, BLOCK_D, BLOCK_ROWS, ROTATION,
            )  # fmt: skip
        elif block < 2 * row_blocks:
            append_part(
                values, slots, pool_values, scales, block - row_blocks, tokens, value_stride,
                1, HEADS, DIM, BLOCK_D, BLOCK_ROWS, ROTATION,
            )  # fmt: skip
    if ROTATE:
        if block >= 2 * row_blocks:
            rotate_queries_part(
                query, rotated, block - 2 * row_blocks, query_tokens, query_stride,
                QUERY_HEADS, DIM, BLOCK_D, BLOCK_ROWS, ROTATION,
            )  # fmt: skip


def append_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    storage: PoolStorage,
    layer: int,
) -> None:
    """As `reference.append_rows`; keys and values may be slices of a wider row of the model."""
    _launch(keys, values, slots, None, storage, layer)


def append_and_rotate(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    query: torch.Tensor,
    storage: PoolStorage,
    layer: int,
) -> torch.Tensor:
    """Append to an int4 pool and rotate the queries in the same launch.

    Args:
        query: ``[B, Q, Hq, D]``.

    Returns:
        ``[B, Q, Hq, D]`` float16: rotated queries, dimensions in the order of the nibble planes.
    """
    return _launch(keys, values, slots, query, storage, layer)


def rotate_queries(query: torch.Tensor, storage: PoolStorage) -> torch.Tensor:
    """The rotation of `append_and_rotate` alone."""
    return _launch(None, None, None, query, storage, 0)


def token_stride(rows: torch.Tensor) -> int:
    """Elements between tokens of ``[..., heads, D]``, where the tokens may be slices of wider rows.

    Raises:
        ValueError: tokens are not evenly spaced, or their heads are not contiguous.
    """
    heads, dim = rows.shape[-2:]
    if rows.stride(-1) != 1 or (heads > 1 and rows.stride(-2) != dim):
        raise ValueError(f"heads of shape {tuple(rows.shape)} are not contiguous")
    stride, tokens = None, 1
    for size, step in zip(reversed(rows.shape[:-2]), reversed(rows.stride()[:-2]), strict=True):
        if size > 1:
            stride = step if stride is None else stride
            if step != stride * tokens:
                raise ValueError(f"tokens of shape {tuple(rows.shape)} are not evenly spaced")
            tokens *= size
    return heads * dim if stride is None else stride


def _launch(keys, values, slots, query, storage: PoolStorage, layer: int) -> torch.Tensor | None:
    tokens = 0 if keys is None else keys.shape[0]
    query_heads = 0 if query is None else query.shape[-2]
    query_tokens = 0 if query is None else query.shape[:-2].numel()
    rotated = None
    if query is not None:
        rotated = torch.empty(query.shape, dtype=torch.float16, device=query.device)
    row_blocks = triton.cdiv(tokens * storage.heads, BLOCK_ROWS)
    query_blocks = triton.cdiv(query_tokens * query_heads, BLOCK_ROWS)
    if row_blocks + query_blocks == 0:
        return rotated
    pool = {name: typed(tensor[layer]) for name, tensor in storage.tensors.items()}
    append_kernel[(2 * row_blocks + query_blocks,)](
        keys,
        values,
        slots,
        pool["keys"],
        pool["values"],
        pool.get("scales"),
        query,
        rotated,
        tokens,
        query_tokens,
        row_blocks,
        0 if keys is None else token_stride(keys),
        0 if values is None else token_stride(values),
        0 if query is None else token_stride(query),
        HEADS=storage.heads,
        QUERY_HEADS=query_heads,
        APPEND=tokens > 0,
        ROTATE=query_heads > 0,
        DIM=storage.head_dim,
        BLOCK_D=triton.next_power_of_2(storage.head_dim),
        BLOCK_ROWS=BLOCK_ROWS,
        ROTATION=rotation_of(storage),
        num_warps=NUM_WARPS,
        **EXACT,
    )
    return rotated
