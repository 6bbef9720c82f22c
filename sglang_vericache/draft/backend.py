"""Attention backend whose KV is the draft pool."""

from __future__ import annotations

from types import SimpleNamespace

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_vericache.kernels.draft_attention import (
    append_and_attend,
    create_workspace,
    draft_attention,
)
from sglang_vericache.pool.draft_pool import DraftPool
from sglang_vericache.pool.rows import DraftRows


class DraftAttentionBackend(AttentionBackend):
    """One query token a request over its row of draft slots.

    Nothing is planned on the host: rows, lengths and slots are tensors of the forward batch, so a
    captured step can be replayed. Where K and V go is decided by `token_to_kv_pool`, as in every
    SGLang backend; entering the forward context with this backend is all that drafting needs.
    """

    needs_cpu_seq_lens = False

    def __init__(
        self, pool: DraftPool, rows: DraftRows, query_heads: int, max_requests: int
    ) -> None:
        super().__init__()
        self.token_to_kv_pool = pool
        self.req_to_token_pool = SimpleNamespace(req_to_token=rows.table, size=rows.table.shape[0])
        self.forward_metadata = None
        self.workspace = create_workspace(
            pool.storage, max_requests, query_heads, rows.table.shape[1]
        )

    def init_forward_metadata(self, forward_batch) -> None:
        pass

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        storage = self.token_to_kv_pool.storage
        query = q.view(-1, 1, layer.tp_q_head_num, layer.qk_head_dim)
        view = (
            storage,
            layer.layer_id,
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            layer.scaling,
            layer.logit_cap,
            self.workspace,
        )
        if save_kv_cache and k is not None:
            shape = (-1, storage.heads, storage.head_dim)
            slots = forward_batch.out_cache_loc
            output = append_and_attend(query, k.view(shape), v.view(shape), slots, *view)
        else:
            output = draft_attention(query, *view)
        return output.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_extend(self, *args, **kwargs):
        raise AssertionError("the draft view serves one-token forwards only")

    def support_triton(self) -> bool:
        return False
