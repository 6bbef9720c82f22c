"""Window scores in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def score_window(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    key_buffers: Sequence[torch.Tensor],
    slots: torch.Tensor,
    start: int,
    scaling: float,
) -> torch.Tensor:
    """Mean attention of a window of queries over the tokens [start, start + T) of a path.

    Softmax runs over these T tokens, causal by position; the mean over the window and the query
    heads of a kv head. Nothing is smoothed.

    Args:
        queries: ``[L, W, Hq, D]`` after rotary embedding, the path's end in each layer. Pass slices
            of this and of ``key_buffers`` to score some layers only.
        query_positions: ``[W]`` integers, path positions of the queries.
        key_buffers: L tensors ``[S, H, D]``, the main pool; H divides Hq.
        slots: ``[T]`` integers, main-pool slots of the tokens.
        start: path position of the first token.
        scaling: softmax scale.

    Returns:
        ``[L, H, T]`` float32. A query that sees none of the tokens adds nothing.
    """
    layers, window, _, dim = queries.shape
    heads = key_buffers[0].shape[1]
    positions = torch.arange(slots.shape[0], device=slots.device) + start
    visible = positions <= query_positions[:, None]  # [W, T]
    masses = []
    for layer in range(layers):
        keys = key_buffers[layer][slots.long()].float()  # [T, H, D]
        grouped = queries[layer].float().view(window, heads, -1, dim)  # [W, H, G, D]
        logits = torch.einsum("whgd,thd->hgwt", grouped, keys) * scaling
        weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        masses.append(weights.masked_fill(~visible, 0.0).mean(dim=(1, 2)))
    return torch.stack(masses)
