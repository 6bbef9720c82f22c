"""FlashInfer's plan of a verify pass that reads shared prefixes once (cascade attention).

Queries of all requests below a prefix attend to it together, as those of one long request, and
each request's own to the rest of its context. The two states are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from sglang.kernels.ops.attention.kv_indices import create_flashinfer_kv_indices_triton
from sglang.srt.layers.attention.flashinfer_backend import PrefillMetadata
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_vericache.kernels.merge_states import merge_states
from sglang_vericache.upload import to_device
from sglang_vericache.verify.chain_plan import INDEX_PROGRAMS, INT_WORKSPACE_BYTES
from sglang_vericache.verify.plan_fence import PlanFence


class CascadeAttention:
    """Stands for one FlashInfer wrapper where SGLang calls it."""

    def __init__(self, prefixes: Any, rest: Any) -> None:
        self.prefixes, self.rest = prefixes, rest

    def forward(self, q: torch.Tensor, paged_kv_cache: Any, causal: bool, **options: Any):
        assert causal, "a chain is verified"
        output, lse = self.rest.forward_return_lse(q, paged_kv_cache, causal=True, **options)
        other, other_lse = self.prefixes.forward_return_lse(
            q, paged_kv_cache, causal=False, **options
        )
        merge_states(output, lse, other, other_lse)
        return output


class CascadePlan:
    """Attention of a pass that is not captured; any number of requests of one width.

    Args:
        kv_indices: ``[N]`` int32, where the slots of a pass are listed: those of each request's
            own tokens, then those of the prefixes.
    """

    def __init__(self, model_runner: ModelRunner, width: int, kv_indices: torch.Tensor) -> None:
        self.backend = backend = cast(Any, model_runner.attn_backend)
        self.width, self.kv_indices = width, kv_indices
        self.updater = backend.indices_updater_prefill
        self._prefixes, self._rest = (self._wrapper(backend) for _ in range(2))
        self.metadata = PrefillMetadata(
            [CascadeAttention(self._prefixes, self._rest)], False, False
        )
        self._fence = PlanFence()

    def _wrapper(self, backend: Any) -> Any:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            backend.workspace_buffer, "NHD", backend=backend.prefill_backend
        )
        device = self.kv_indices.device
        workspace = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper.reset_workspace_buffer(backend.workspace_buffer, workspace)
        return wrapper

    def plan(self, committed: Sequence[int], groups: Sequence[tuple[int, int]], size: int) -> None:
        """Plan a pass over ``size`` requests of so many committed tokens; padding has none.

        Args:
            groups: (requests, shared tokens) of those that come first.
        """
        padded = [*committed, *[0] * (size - len(committed))]
        starts = [tokens for count, tokens in groups for _ in range(count)]
        starts += [0] * (size - len(starts))
        own = [total - start + self.width for total, start in zip(padded, starts, strict=True)]
        own_ends = [0, *accumulate(own)]
        # Those of no group read nothing together.
        grouped = sum(count for count, _ in groups)
        blocks = [*groups, (size - grouped, 0)] if grouped < size else list(groups)
        prefix_ends = list(accumulate((t for _, t in blocks), initial=own_ends[-1]))
        query_ends = [0, *(self.width * n for n in accumulate(count for count, _ in blocks))]
        device = self.kv_indices.device
        self._own_indptr, self._starts, self._own = _int32(device, own_ends, starts, own)
        firsts = [0, *accumulate(count for count, _ in groups)][:-1]
        self._prefix_indptr, self._prefix_lengths = _int32(
            device, prefix_ends[: len(groups) + 1], [tokens for _, tokens in groups]
        )
        self._firsts = to_device(firsts, device)
        with self._fence.planning():
            uniform = range(0, size * self.width + 1, self.width)
            self._begin(self._rest, uniform, own_ends, causal=True)
            self._begin(self._prefixes, query_ends, prefix_ends, causal=False)

    def _begin(self, wrapper: Any, query_ends: Any, kv_ends: Any, causal: bool) -> None:
        updater = self.updater
        query_indptr, kv_indptr = (
            torch.tensor(list(ends), dtype=torch.int32).pin_memory()
            for ends in (query_ends, kv_ends)
        )
        wrapper.begin_forward(
            query_indptr,
            kv_indptr,
            self.kv_indices,
            torch.ones(len(query_indptr) - 1, dtype=torch.int32).pin_memory(),
            updater.num_qo_heads,
            updater.num_kv_heads,
            updater.head_dim,
            1,
            causal=causal,
            q_data_type=updater.q_data_type,
            kv_data_type=updater.data_type,
            non_blocking=True,
        )

    def fill_indices(
        self, req_to_token: torch.Tensor, requests: torch.Tensor, committed: torch.Tensor
    ) -> None:
        """List the slots that the planned pass reads; on the device only.

        Args:
            requests: ``[size]`` rows of the request tables.
        """
        self._fill(req_to_token, requests, self._own, self._own_indptr, self._starts)
        leaders = requests[self._firsts]
        self._fill(req_to_token, leaders, self._prefix_lengths, self._prefix_indptr, None)

    def _fill(self, table, requests, lengths, indptr, starts) -> None:
        create_flashinfer_kv_indices_triton[(len(lengths), INDEX_PROGRAMS)](
            table,
            requests,
            lengths,
            indptr,
            starts,
            self.kv_indices,
            table.stride(0),
            TOKEN_BLOCK_PARALLEL=True,
        )


def _int32(device: torch.device, *lists: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Each of them on the device, in one copy."""
    flat = to_device([n for values in lists for n in values], device).to(torch.int32)
    return flat.split([len(values) for values in lists])
