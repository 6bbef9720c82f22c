"""A verify batch on SGLang's own memory pool, and what causal attention gives in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_vericache.kernels.pool_format import PoolStorage
from sglang_vericache.verify.row_attention import RowAttention

DIM, SLOTS, LAYERS = 16, 200, 2
# float32 sums over 16 dimensions and up to 60 tokens, compared with float64.
TOLERANCE = 2e-6
# (committed tokens, width)
SIZES = (([7], 1), ([7], 5), ([0], 3), ([40, 1, 13], 4), ([20, 20], 9))
NAMES = ("decode", "one", "nothing-before", "ragged", "even")


class Batch:
    """A verify batch of ``len(lengths)`` requests, ``width`` tokens each, in layer 1."""

    def __init__(self, lengths: list[int], width: int, heads: int, group: int) -> None:
        self.lengths, self.width, self.heads, self.group = lengths, width, heads, group
        self.pool = MHATokenToKVPool(
            size=SLOTS,
            page_size=1,
            dtype=torch.float32,
            head_num=heads,
            head_dim=DIM,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.copy_(torch.randn(buffer.shape))
        batch = len(lengths)
        self.table = torch.zeros(batch + 2, max(lengths) + width + 3, dtype=torch.int32)
        self.rows = torch.randperm(batch + 2)[:batch]
        free = (torch.randperm(SLOTS) + 1).split(
            [n + width for n in lengths] + [SLOTS - sum(lengths) - batch * width]
        )
        for row, own in zip(self.rows.tolist(), free[:-1], strict=True):
            self.table[row, : len(own)] = own.to(torch.int32)
        self.written = torch.cat([own[-width:] for own in free[:-1]])
        self.backend = TorchNativeAttnBackend(
            SimpleNamespace(
                device="cpu",
                req_to_token_pool=SimpleNamespace(req_to_token=self.table),
                token_to_kv_pool=self.pool,
            )
        )
        self.layer = SimpleNamespace(
            layer_id=1,
            tp_q_head_num=heads * group,
            tp_k_head_num=heads,
            tp_v_head_num=heads,
            qk_head_dim=DIM,
            v_head_dim=DIM,
            scaling=0.3,
            logit_cap=0.0,
            k_scale=None,
            v_scale=None,
        )
        self.forward = SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            out_cache_loc=self.written,
            req_pool_indices=self.rows,
            seq_lens=torch.tensor(lengths),
            spec_info=SimpleNamespace(draft_token_num=width),
        )
        tokens = batch * width
        self.q = torch.randn(tokens, heads * group * DIM)
        self.k, self.v = torch.randn(2, tokens, heads, DIM)

    def formula(self) -> np.ndarray:
        """What decoding the same tokens one by one gives: each sees all up to itself."""
        keys = self.pool.get_key_buffer(1).double().numpy()
        values = self.pool.get_value_buffer(1).double().numpy()
        query = self.q.double().numpy().reshape(len(self.lengths), self.width, -1, DIM)
        output = np.zeros(query.shape)
        for b, length in enumerate(self.lengths):
            for i in range(self.width):
                seen = self.table[self.rows[b], : length + i + 1].tolist()
                for head in range(self.heads * self.group):
                    logits = 0.3 * keys[seen, head // self.group] @ query[b, i, head]
                    weights = np.exp(logits - logits.max())
                    weights /= weights.sum()
                    output[b, i, head] = weights @ values[seen, head // self.group]
        return output.reshape(self.q.shape)


def row_attention_for(batch: Batch) -> RowAttention:
    """Our kernel's attention over the batch's pool."""
    table = SimpleNamespace(req_to_token=batch.table, size=len(batch.lengths))
    storage = PoolStorage.over(batch.pool.k_buffer, batch.pool.v_buffer)
    query_heads = batch.heads * batch.group
    return RowAttention(batch.pool, table, storage, query_heads, table.size, batch.width)
