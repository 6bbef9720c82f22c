"""FlashInfer's plan of a verify pass, made from lengths that the host knows.

SGLang's own planning of such a pass reads its lengths back from the device, which waits for all
that was launched before: here, for a whole round of draft steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from sglang.kernels.ops.attention.kv_indices import create_flashinfer_kv_indices_triton
from sglang.srt.layers.attention.flashinfer_backend import (
    FlashInferAttnBackend,
    PrefillMetadata,
)
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_vericache.verify.plan_fence import PlanFence

# FlashInfer's plan of some hundred requests takes a few KiB; its own default is 8 MiB a wrapper.
INT_WORKSPACE_BYTES = 1 << 20
# Programs that fill one request's slots: as long as contexts get, a program takes 512 at a time.
INDEX_PROGRAMS = 8


def plans_on_host(model_runner: ModelRunner) -> bool:
    """Whether the target's attention backend is one whose plan `ChainPlan` can make."""
    backend = model_runner.attn_backend
    return (
        isinstance(backend, FlashInferAttnBackend)
        and backend.prefill_backend == "fa2"
        and backend.dispatch_reason is None
        and backend.page_size == 1
        and not backend.prefill_uses_dequant_workspace
        and not backend.kv_index_translator.reads_are_translated
    )


class ChainPlan:
    """Attention of ``size`` requests with ``width`` queries each, at fixed addresses.

    Args:
        kv_indices: ``[N]`` int32, where the slots of a pass are listed; passes share it.
    """

    def __init__(
        self, model_runner: ModelRunner, size: int, width: int, kv_indices: torch.Tensor
    ) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self.backend = backend = cast(Any, model_runner.attn_backend)
        self.size, self.width = size, width
        self.kv_indices, self.updater = kv_indices, backend.indices_updater_prefill
        device = kv_indices.device
        self.kv_indptr = torch.zeros(size + 1, dtype=torch.int32, device=device)
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(
            backend.workspace_buffer,
            "NHD",
            use_cuda_graph=True,
            backend=backend.prefill_backend,
            qo_indptr_buf=torch.zeros(size + 1, dtype=torch.int32, device=device),
            paged_kv_indptr_buf=self.kv_indptr,
            paged_kv_indices_buf=kv_indices,
            paged_kv_last_page_len_buf=torch.ones(size, dtype=torch.int32, device=device),
        )
        workspace = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper.reset_workspace_buffer(backend.workspace_buffer, workspace)
        self.metadata = PrefillMetadata([self._wrapper], False, False)
        # The device copies them after `plan` has returned, as it does what FlashInfer plans.
        self._fence = PlanFence()
        self._lengths = torch.zeros(size, dtype=torch.int32).pin_memory()
        self._kv_indptr_host = torch.zeros(size + 1, dtype=torch.int32).pin_memory()
        self._query_indptr = (torch.arange(size + 1, dtype=torch.int32) * width).pin_memory()
        self._last_page = torch.ones(size, dtype=torch.int32).pin_memory()
        self._prepared = False

    def fits(self, committed: Sequence[int]) -> bool:
        return sum(committed) + self.width * self.size <= self.kv_indices.numel()

    def plan(self, committed: Sequence[int]) -> None:
        """Plan a pass over requests of so many committed tokens; padding has none."""
        with self._fence.planning():
            self._plan(committed)

    def _plan(self, committed: Sequence[int]) -> None:
        self._lengths[: len(committed)] = torch.tensor(committed, dtype=torch.int32)
        self._lengths[len(committed) :] = 0
        self._lengths += self.width
        torch.cumsum(self._lengths, 0, dtype=torch.int32, out=self._kv_indptr_host[1:])
        if not self._prepared:
            self._prepare()
            self._prepared = True
        self.kv_indptr.copy_(self._kv_indptr_host, non_blocking=True)
        self._plan_uniformly()

    def _prepare(self) -> None:
        """Let the wrapper load its module and take what no later plan changes."""
        updater = self.updater
        self._wrapper.begin_forward(
            self._query_indptr,
            self._kv_indptr_host,
            self.kv_indices[:0],  # filled on the device by `fill_indices`
            self._last_page,
            updater.num_qo_heads,
            updater.num_kv_heads,
            updater.head_dim,
            1,
            q_data_type=updater.q_data_type,
            kv_data_type=updater.data_type,
            non_blocking=True,
            seq_lens=self._lengths,
            max_token_per_sequence=self.width,
        )

    def _plan_uniformly(self) -> None:
        """Plan through the wrapper's module, as SGLang's own ``fast_prefill_plan`` does.

        What both that function and the wrapper leave out is said here: every request has ``width``
        queries. Without it a plan for a graph takes tiles of 128 rows of queries, however few a
        request has, and computes most of them in vain.
        """
        wrapper: Any = self._wrapper
        updater = self.updater
        wrapper._plan_info = wrapper._cached_module.plan(
            wrapper._float_workspace_buffer,
            wrapper._int_workspace_buffer,
            wrapper._pin_memory_int_workspace_buffer,
            self._query_indptr,
            self._kv_indptr_host,
            self._lengths,
            self.size * self.width,
            self.size,
            updater.num_qo_heads,
            updater.num_kv_heads,
            1,  # tokens of a page
            True,  # for a graph
            updater.head_dim,
            updater.head_dim,
            True,  # causal
            -1,  # no window
            -1,  # splits as they fill the device
            False,  # may be split
            0,  # nothing else runs beside it
            self.width,
        )

    def fill_indices(
        self, req_to_token: torch.Tensor, requests: torch.Tensor, committed: torch.Tensor
    ) -> None:
        """List the slots of every request's committed and drafted tokens; on the device only.

        Args:
            requests, committed: ``[size]``.
        """
        create_flashinfer_kv_indices_triton[(self.size, INDEX_PROGRAMS)](
            req_to_token,
            requests,
            committed + self.width,
            self.kv_indptr,
            None,
            self.kv_indices,
            req_to_token.stride(0),
            TOKEN_BLOCK_PARALLEL=True,
        )
