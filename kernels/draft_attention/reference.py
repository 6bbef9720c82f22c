"""Draft attention in torch: the oracle of the kernel, and what runs without a GPU."""

from __future__ import annotations

import torch

from sglang_vericache.kernels.append_rows.reference import append_rows
from sglang_vericache.kernels.pool_format import PoolStorage


def draft_attention(
    query: torch.Tensor,
    storage: PoolStorage,
    layer: int,
    row_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Attention over draft views, grouped-query, causal among the query tokens.

    A view is a row of slots; slot j of a row holds, for each kv head, some kept token of that
    head, so the order of rows carries no meaning beyond "the queries are the last ones".

    Args:
        query: ``[B, Q, Hq, D]``, after rotary embedding; its own keys and values are stored
            already, in the last Q rows of the view.
        storage: draft pool; H = ``storage.heads`` divides Hq.
        row_table: ``[R, W]`` int32 slots, one row a request.
        rows: ``[B]`` int64 rows of ``row_table``.
        lengths: ``[B]`` integers, on the same device: rows of each view, the Q queries included.
            0 for a row that pads the batch.
        scaling: softmax scale.
        logit_cap: tanh soft cap of the logits; 0 for none.

    Returns:
        ``[B, Q, Hq, D]`` in the dtype of ``query``; zeros where a query sees no row.

    Note:
        The gather is as wide as the longest view, which this reference reads back to the host.
    """
    batch, queries, query_heads, dim = query.shape
    width = int(lengths.max())
    keys, values = storage.read(layer, row_table[rows, :width].long())  # [B, W, H, D]
    grouped = query.float().view(batch, queries, storage.heads, -1, dim)  # [B, Q, H, G, D]
    logits = torch.einsum("bqhgd,bwhd->bhgqw", grouped, keys.float()) * scaling
    if logit_cap > 0.0:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    column = torch.arange(width, device=query.device)
    newer = torch.arange(queries - 1, -1, -1, device=query.device)  # queries after this one
    visible = column < (lengths[:, None, None] - newer[None, :, None])  # [B, Q, W]
    logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
    # A slot past the end may hold anything; zero weight times not-a-number is not zero.
    past_end = column >= lengths[:, None]  # [B, W]
    values = values.float().masked_fill(past_end[:, :, None, None], 0.0)
    weights = logits.softmax(dim=-1).masked_fill(~visible[:, None, None], 0.0)
    output = torch.einsum("bhgqw,bwhd->bqhgd", weights, values)
    return output.reshape(batch, queries, query_heads, dim).to(query.dtype)


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
) -> torch.Tensor:
    """Store the queries' own keys and values, then attend: a layer of a draft step.

    Args:
        keys, values: ``[B * Q, H, D]`` of the query tokens.
        slots: ``[B * Q]`` integers, where they go: the last Q entries of each view, in order; 0
            for a row that pads the batch.

    Others, and what is returned, as for `draft_attention`.
    """
    append_rows(keys, values, slots, storage, layer)
    return draft_attention(query, storage, layer, row_table, rows, lengths, scaling, logit_cap)
