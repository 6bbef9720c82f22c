"""The verify pass: all drafted tokens of some requests in one forward over the full KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_vericache.sub_batch import sub_batch
from sglang_vericache.verify.accept import accept_longest_prefix
from sglang_vericache.verify.chain_input import chain_verify_input
from sglang_vericache.verify.token_picker import TokenPicker


@dataclass(frozen=True)
class Verified:
    """Outcome of a verify pass over n requests at width w.

    Attributes:
        tokens: ``[n, w]`` the full model's tokens; the first ``yields[i]`` are request i's next.
        yields: ``[n]`` int64 in [1, w].
        source_slots: ``[n, w]`` int64 main slots of the tokens that were read: the pending one
            and the drafted ones. Their exact KV is there now.
    """

    tokens: torch.Tensor
    yields: torch.Tensor
    source_slots: torch.Tensor


class Verifier:
    """Runs the target model on pending and drafted tokens, and accepts.

    Args:
        drafts: ``[R, horizon]`` int64, the drafted tokens by request row.
        max_position: last position that the model's rotary embedding knows.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        drafts: torch.Tensor,
        picker: TokenPicker,
        max_position: int,
    ) -> None:
        self.model_runner, self.drafts, self.picker = model_runner, drafts, picker
        self.max_position = max_position

    def run(
        self,
        batch: ScheduleBatch,
        index: torch.Tensor,
        indices: Sequence[int],
        drafted: Sequence[int],
        pending: torch.Tensor,
    ) -> Verified:
        """Verify requests ``indices`` with ``drafted`` tokens each, at the width of the longest.

        Args:
            index: ``indices`` as an int64 tensor on the device.
            pending: ``[bs]`` the token of each request whose KV is not computed yet.

        Note:
            Shorter drafts are padded; the padding's KV lands in slots past the committed length
            that the next tokens overwrite, and nothing that is accepted attends to it.
        """
        device = batch.seq_lens.device
        width = max(drafted) + 1
        requests, committed = batch.req_pool_indices[index], batch.seq_lens[index]
        draft_tokens = self.drafts[requests, : width - 1]  # a copy: advanced indexing
        input_ids = torch.cat([pending[index, None], draft_tokens], dim=1)
        positions = committed[:, None] + torch.arange(width, device=device)
        table = batch.req_to_token_pool.req_to_token
        source_slots = table[requests[:, None], positions].to(torch.int64)
        part = sub_batch(
            batch,
            indices,
            index,
            ForwardMode.TARGET_VERIFY,
            committed,
            input_ids.flatten(),
            source_slots.flatten(),
        )
        part.seq_lens_cpu = batch.seq_lens_cpu[list(indices)]
        positions = positions.clamp(max=self.max_position).flatten()
        part.spec_info = chain_verify_input(part.input_ids, positions, width)
        forward_batch = ForwardBatch.init_new(
            part,
            self.model_runner,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            return_hidden_states_before_norm=False,
        )
        with self.picker.active() as picked:
            self.model_runner.forward(forward_batch)
        tokens = picked.tokens.view(-1, width)
        lengths = torch.tensor(list(drafted), device=device)
        yields = accept_longest_prefix(draft_tokens, lengths, tokens)
        return Verified(tokens, yields, source_slots)
