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
from sglang_vericache.pool.rows import DraftRows
from sglang_vericache.verify.token_picker import TokenPicker


class DraftStep:
    """The next drafted token of up to ``capacity`` requests.

    A step reads where each request stands from the tensors below and moves them on, so the next
    step needs nothing from the host. A request that has reached its target stands still: its
    token goes to padding.

    Attributes:
        requests: ``[capacity]`` rows of the request tables; row 0 is padding.
        tokens: ``[capacity]`` the token whose KV the next step computes.
        positions: ``[capacity]`` its path position.
        lengths: ``[capacity]`` rows of the draft view, that token included.
        columns, targets: ``[capacity]`` tokens drafted, and wanted.
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

        def column() -> torch.Tensor:
            return torch.zeros(capacity, dtype=torch.int64, device=drafts.device)

        self.requests, self.tokens, self.positions = column(), column(), column()
        self.lengths, self.columns, self.targets = column(), column(), column()
        self.slots = column()
        self._batches: dict[int, ForwardBatch] = {}

    def load(
        self,
        requests: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        lengths: torch.Tensor,
        drafted: torch.Tensor,
        wanted: torch.Tensor,
        size: int,
    ) -> None:
        """Set the state of the first n requests, and padding up to ``size``."""
        count = requests.shape[0]
        for target, source in (
            (self.requests, requests),
            (self.tokens, tokens),
            (self.positions, positions),
            (self.lengths, lengths),
            (self.columns, drafted),
            (self.targets, wanted),
        ):
            target[:count] = source
            target[count:size] = 0
        self.lengths[count:size] = 1

    def advance(self, size: int) -> None:
        """Draft one token for each of the first ``size`` requests that want more."""
        live = slice(0, size)
        requests, columns = self.requests[live], self.columns[live]
        wants = columns < self.targets[live]
        slots = self.rows.table[requests, self.lengths[live] - 1]
        self.slots[live] = torch.where(wants, slots, 0)
        tokens = self._forward(size)
        padding = self.drafts.shape[1] - 1
        self.drafts[requests, torch.where(wants, columns, padding)] = tokens
        self.tokens[live] = torch.where(wants, tokens, self.tokens[live])
        moved = wants.to(torch.int64)
        self.positions[live] += moved
        self.lengths[live] += moved
        self.columns[live] += moved

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
        live = slice(0, size)
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=size,
            input_ids=self.tokens[live],
            req_pool_indices=self.requests[live],
            seq_lens=self.lengths[live],
            out_cache_loc=self.slots[live],
            seq_lens_sum=None,
            positions=self.positions[live],
            return_logprob=False,
            spec_algorithm=self.model_runner.spec_algorithm,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            global_num_token_non_padded_cpu=size,
        )
