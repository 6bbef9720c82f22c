"""Attention of a few query tokens over the draft view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_vericache.kernels.dispatch import runs_triton
from sglang_vericache.kernels.draft_attention import reference
from sglang_vericache.kernels.pool_format import PoolStorage

if TYPE_CHECKING:
    from sglang_vericache.kernels.draft_attention.workspace import Workspace

__all__ = ["append_and_attend", "create_workspace", "draft_attention", "most_query_rows"]


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
) -> torch.Tensor:
    """See `reference.draft_attention`; ``workspace`` as `create_workspace` gives it."""
    arguments = (query, storage, layer, row_table, rows, lengths, scaling, logit_cap)
    if not runs_triton(query):
        return reference.draft_attention(*arguments)
    from sglang_vericache.kernels.draft_attention import triton

    return triton.draft_attention(*arguments, workspace)


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
) -> torch.Tensor:
    """See `reference.append_and_attend`; ``workspace`` as `create_workspace` gives it."""
    new = (query, keys, values, slots)
    arguments = (*new, storage, layer, row_table, rows, lengths, scaling, logit_cap)
    if not runs_triton(query):
        return reference.append_and_attend(*arguments)
    from sglang_vericache.kernels.draft_attention import triton

    return triton.append_and_attend(*arguments, workspace)


def create_workspace(
    storage: PoolStorage,
    max_batch: int,
    query_heads: int,
    table_width: int,
    max_queries: int = 1,
) -> Workspace | None:
    """Memory that every layer and step of one stream can share; None where none is needed.

    Args:
        max_batch: requests of the largest batch.
        query_heads: Hq of the queries.
        table_width: W of the row table.
        max_queries: the largest Q.
    """
    if not runs_triton(storage.tensors["keys"][0]):
        return None
    from sglang_vericache.kernels.draft_attention.workspace import Workspace

    return Workspace.create(storage, max_batch, query_heads, table_width, max_queries)


def most_query_rows(storage: PoolStorage) -> int | None:
    """The largest product of queries and query heads of a kv head; None for no limit."""
    if not runs_triton(storage.tensors["keys"][0]):
        return None
    from sglang_vericache.kernels.draft_attention import config

    return config.most_query_rows(storage)
