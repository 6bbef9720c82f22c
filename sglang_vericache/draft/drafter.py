"""Drafting: one-token forwards of the target model over the draft views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_vericache.draft.backend import DraftAttentionBackend
from sglang_vericache.pool.rows import DraftRows
from sglang_vericache.sub_batch import sub_batch
from sglang_vericache.verify.token_picker import TokenPicker


class Drafter:
    """Extends the drafted tokens of some requests; everything a step needs stays on the device.

    Args:
        drafts: ``[R, horizon]`` int64, the drafted tokens by request row; written here.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        backend: DraftAttentionBackend,
        rows: DraftRows,
        drafts: torch.Tensor,
        picker: TokenPicker,
    ) -> None:
        self.model_runner, self.backend = model_runner, backend
        self.rows, self.drafts, self.picker = rows, drafts, picker

    def run(
        self,
        batch: ScheduleBatch,
        work: Sequence[tuple[int, int]],
        drafted: Sequence[int],
        pending: torch.Tensor,
    ) -> None:
        """Draft ``count`` more tokens for each (index, count) of ``work``.

        Args:
            drafted: tokens that each request of ``work`` has drafted already.
            pending: ``[bs]`` the token of each request whose KV is not computed yet.

        Precondition: the row of each request holds a slot for every token drafted here.
        """
        order = sorted(range(len(work)), key=lambda i: -work[i][1])
        counts = [work[i][1] for i in order]
        device = batch.seq_lens.device
        index = torch.tensor([work[i][0] for i in order], device=device)
        done = torch.tensor([drafted[i] for i in order], device=device)
        requests = batch.req_pool_indices[index]
        last = self.drafts[requests, (done - 1).clamp(min=0)]
        tokens = torch.where(done > 0, last, pending[index])
        positions = batch.seq_lens[index] + done
        lengths = positions + self.rows.offsets[requests] + 1
        forward_batch = self._forward_batch(
            batch, [work[i][0] for i in order], index, tokens, positions, lengths
        )
        for step in range(counts[0]):
            live = sum(count > step for count in counts)  # a prefix: counts descend
            self._point_at(forward_batch, requests[:live], tokens, positions, lengths)
            with (
                forward_context(ForwardContext(attn_backend=self.backend)),
                self.picker.active() as picked,
            ):
                self.model_runner.forward(forward_batch)
            tokens = picked.tokens
            self.drafts[requests[:live], done[:live] + step] = tokens
            positions, lengths = positions[:live] + 1, lengths[:live] + 1

    def _forward_batch(self, batch, indices, index, tokens, positions, lengths) -> ForwardBatch:
        part = sub_batch(
            batch, indices, index, ForwardMode.DECODE, lengths, tokens, torch.zeros_like(tokens)
        )
        forward_batch = ForwardBatch.init_new(
            part,
            self.model_runner,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            return_hidden_states_before_norm=False,
        )
        # The target's backend must not plan for a view it does not own.
        forward_batch.mark_forward_metadata_ready()
        return forward_batch

    def _point_at(self, forward_batch, requests, tokens, positions, lengths) -> None:
        live = requests.numel()
        forward_batch.batch_size = live
        forward_batch.req_pool_indices = requests
        forward_batch.input_ids = tokens[:live]
        forward_batch.positions = positions[:live]
        forward_batch.seq_lens = lengths[:live]
        forward_batch.out_cache_loc = self.rows.table[requests, lengths[:live] - 1].to(torch.int64)
        forward_batch.global_num_token_non_padded_cpu = live
