"""Attention over the rows of a table of slots, as an SGLang backend."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_vericache.kernels.draft_attention import (
    append_and_attend,
    create_workspace,
    draft_attention,
)
from sglang_vericache.kernels.pool_format import PoolStorage


class RowTableAttention(AttentionBackend):
    """A few query tokens a request over the slots of its row; stores their keys and values.

    Nothing is planned on the host: rows, lengths and slots are tensors of the forward batch, so a
    captured forward can be replayed. Where K and V go is decided by `token_to_kv_pool`, as in every
    SGLang backend; entering the forward context with this backend is all that a forward needs.

    Args:
        kv_pool, storage: where keys and values are, and what kernels see of it.
        row_pool: has the table of slots.
        most, widest: requests and query tokens of a request in the largest forward.
    """

    def __init__(
        self,
        kv_pool: Any,
        row_pool: Any,
        storage: PoolStorage,
        query_heads: int,
        most: int,
        widest: int = 1,
    ) -> None:
        super().__init__()
        self.token_to_kv_pool, self.req_to_token_pool = kv_pool, row_pool
        self.storage = storage
        self.forward_metadata: Any = None
        table_width = row_pool.req_to_token.shape[1]
        self.workspace = create_workspace(storage, most, query_heads, table_width, widest)

    def attend(
        self,
        tensors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        layer: Any,
        forward_batch: Any,
        lengths: torch.Tensor,
        width: int,
        save: bool,
    ) -> torch.Tensor:
        """Args:
            tensors: query ``[B * width, Hq * D]``, and keys and values ``[B * width, H * D]`` of
                the same tokens, which may be None where they are stored already.
            lengths: ``[B]`` rows of each request, those of the query tokens included.

        Returns:
            ``[B * width, Hq * D]``.
        """
        q, k, v = tensors
        query = q.view(-1, width, layer.tp_q_head_num, layer.qk_head_dim)
        view = (
            self.storage,
            layer.layer_id,
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            lengths,
            layer.scaling,
            layer.logit_cap,
            self.workspace,
        )
        if save and k is not None and v is not None:
            shape = (-1, self.storage.heads, self.storage.head_dim)
            slots = forward_batch.out_cache_loc
            output = append_and_attend(query, k.view(shape), v.view(shape), slots, *view)
        else:
            output = draft_attention(query, *view)
        return output.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def support_triton(self) -> bool:
        return False
