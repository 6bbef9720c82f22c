"""Attention backend whose KV is the draft pool."""

from __future__ import annotations

from types import SimpleNamespace

from sglang_vericache.pool.draft_pool import DraftPool
from sglang_vericache.pool.rows import DraftRows
from sglang_vericache.row_table_attention import RowTableAttention


class DraftAttentionBackend(RowTableAttention):
    """One query token a request over its row of draft slots."""

    def __init__(
        self, pool: DraftPool, rows: DraftRows, query_heads: int, max_requests: int
    ) -> None:
        row_pool = SimpleNamespace(req_to_token=rows.table, size=rows.table.shape[0])
        super().__init__(pool, row_pool, pool.storage, query_heads, max_requests)

    def init_forward_metadata(self, forward_batch) -> None:
        pass

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        lengths = forward_batch.seq_lens
        return self.attend((q, k, v), layer, forward_batch, lengths, 1, save_kv_cache)

    def forward_extend(self, *args, **kwargs):
        raise AssertionError("the draft view serves one-token forwards only")
