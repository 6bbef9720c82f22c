"""Attention of a verify pass by the kernel that draft steps use, over the full KV.

A pass has a few queries a request, which fill one tile of the tensor cores where the heads of a
group are few. The kernel reads the slots of each request from SGLang's table of them and its length
from the device, so nothing is planned on the host, and stores the new keys and values itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_vericache.config import TRITON, VeriCacheConfig
from sglang_vericache.kernels.draft_attention import (
    append_and_attend,
    create_workspace,
    draft_attention,
)
from sglang_vericache.kernels.pool_format import PoolStorage


@dataclass(frozen=True)
class VerifyRows:
    """What all layers of a pass read.

    Attributes:
        lengths: ``[B]`` tokens of each request, the ``width`` that are verified included.
    """

    lengths: torch.Tensor
    width: int


class RowAttention(AttentionBackend):
    """Serves verify passes beside the target's own backend, which goes on serving the rest.

    Args:
        pool: SGLang's, of floating-point keys and values.
        most, widest: requests and tokens of a request in the largest pass.
    """

    needs_cpu_seq_lens = False

    def __init__(
        self,
        pool: Any,
        req_to_token_pool: Any,
        layers: int,
        query_heads: int,
        most: int,
        widest: int,
    ) -> None:
        super().__init__()
        self.token_to_kv_pool, self.req_to_token_pool = pool, req_to_token_pool
        self.storage = PoolStorage.over(
            [pool.get_key_buffer(layer) for layer in range(layers)],
            [pool.get_value_buffer(layer) for layer in range(layers)],
        )
        table_width = req_to_token_pool.req_to_token.shape[1]
        self._workspace = create_workspace(self.storage, most, query_heads, table_width, widest)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        width = forward_batch.spec_info.draft_token_num
        self.forward_metadata = VerifyRows(forward_batch.seq_lens + width, width)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        asked = [name for name, value in kwargs.items() if value is not None]
        if asked or getattr(layer, "xai_temperature_len", 0) > 0:
            raise ValueError(
                "--vericache-verify-attention triton does not fit this model, whose attention has "
                f"{', '.join(asked) or 'a temperature'}: leave that flag out."
            )
        rows: VerifyRows = self.forward_metadata
        query = q.view(-1, rows.width, layer.tp_q_head_num, layer.qk_head_dim)
        view = (
            self.storage,
            layer.layer_id,
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            rows.lengths,
            layer.scaling,
            layer.logit_cap,
            self._workspace,
        )
        if save_kv_cache and k is not None:
            shape = (-1, self.storage.heads, self.storage.head_dim)
            slots = forward_batch.out_cache_loc
            output = append_and_attend(query, k.view(shape), v.view(shape), slots, *view)
        else:
            output = draft_attention(query, *view)
        return output.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_decode(self, *args, **kwargs):
        raise AssertionError("verify passes only")

    def support_triton(self) -> bool:
        return False


def create_row_attention(
    config: VeriCacheConfig, pool: Any, req_to_token_pool: Any, layers: int, query_heads: int
) -> RowAttention | None:
    """None where the target's own backend attends."""
    if config.verify_attention != TRITON:
        return None
    most, widest = req_to_token_pool.size, config.verify_width
    return RowAttention(pool, req_to_token_pool, layers, query_heads, most, widest)


class RowPlan:
    """Stands for `ChainPlan` where there is nothing to plan."""

    def __init__(self, backend: RowAttention, width: int) -> None:
        self.backend, self.width = backend, width
        self.metadata: VerifyRows | None = None

    def fits(self, committed: Sequence[int]) -> bool:
        return True

    def plan(self, committed: Sequence[int]) -> None:
        pass

    def fill_indices(
        self, req_to_token: torch.Tensor, requests: torch.Tensor, committed: torch.Tensor
    ) -> None:
        """Set the lengths that the pass reads; on the device only."""
        self.metadata = VerifyRows(committed + self.width, self.width)
