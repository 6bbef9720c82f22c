"""One draft step over static tensors: what a CUDA graph captures."""

from __future__ import annotations

import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_vericache.draft.backend import DraftAttentionBackend
from sglang_vericache.kernels.draft_state import (
    DraftState,
    find_slots,
    load_requests,
    take_tokens,
)
from sglang_vericache.pool.rows import DraftRows
from sglang_vericache.verify.token_picker import TokenPicker


class DraftStep:
    """The next drafted token of up to ``capacity`` requests.

    A step reads where each request stands from the tensors below and moves them on, so the next
    step needs nothing from the host. A request that has reached its target stands still: its
    token goes to padding.

    Attributes:
        state: of ``capacity`` requests.
        drafts: ``[R, horizon + 1]`` drafted tokens by request row; the last column is padding.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        backend: DraftAttentionBackend,
        rows: DraftRows,
        drafts: torch.Tensor,
        picker: TokenPicker,
        capacity: int,
    ) -> None:
        self.model_runner, self.backend = model_runner, backend
        self.rows, self.drafts, self.picker = rows, drafts, picker
        self.capacity = capacity
        self.context = ForwardContext(attn_backend=backend)

        self.state = DraftState.zeros(capacity, drafts.device)
        self._batches: dict[int, ForwardBatch] = {}

    def load(
        self,
        plan: torch.Tensor,
        requests: torch.Tensor,
        pending: torch.Tensor,
        committed: torch.Tensor,
        size: int,
    ) -> None:
        """Set where the requests of ``plan`` stand, and padding up to ``size``; arguments as those
        of `kernels.draft_state.reference.load_requests`."""
        state, offsets = self.state.first(size), self.rows.offsets
        load_requests(state, plan, requests, pending, committed, self.drafts, offsets)

    def load_padding(self, size: int) -> None:
        none = self.state.requests[:0]
        self.load(none.view(0, 3), none, none, none, size)

    def advance(self, size: int) -> None:
        """Draft one token for each of the first ``size`` requests that want more."""
        state = self.state.first(size)
        find_slots(state, self.rows.table)
        take_tokens(state, self._forward(size), self.drafts)

    def _forward(self, size: int) -> torch.Tensor:
        batch = self._batches.get(size)
        if batch is None:
            batch = self._batches[size] = self._static_batch(size)
        runner = self.model_runner
        with (
            runner.eager_runner.model_context(),
            forward_context(self.context, forward_batch=batch),
            self.picker.active() as picked,
        ):
            runner.model.forward(batch.input_ids, batch.positions, batch)
        return picked.tokens

    def _static_batch(self, size: int) -> ForwardBatch:
        state = self.state.first(size)
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=size,
            input_ids=state.tokens,
            req_pool_indices=state.requests,
            seq_lens=state.lengths,
            out_cache_loc=state.slots,
            seq_lens_sum=None,
            positions=state.positions,
            return_logprob=False,
            spec_algorithm=self.model_runner.spec_algorithm,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            global_num_token_non_padded_cpu=size,
        )
