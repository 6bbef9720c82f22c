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
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_vericache.sub_batch import sub_batch
from sglang_vericache.upload import to_device
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


@dataclass(frozen=True)
class PreparedVerify:
    """A verify pass of n requests at width w, but for the drafted tokens.

    Attributes:
        indices, index: places of the requests in the batch, on the host and ``[n]`` int64.
        requests: ``[n]`` rows of the request tables.
        lengths: ``[n]`` int64 drafted tokens of each.
        input_ids: ``[n, w]``, whose memory the forward batch reads.
    """

    forward_batch: ForwardBatch
    indices: Sequence[int]
    index: torch.Tensor
    requests: torch.Tensor
    lengths: torch.Tensor
    source_slots: torch.Tensor
    input_ids: torch.Tensor


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

    def prepare(
        self,
        batch: ScheduleBatch,
        work: Sequence[tuple[int, int]],
        pending: torch.Tensor,
    ) -> PreparedVerify:
        """Plan a pass at the width of the longest draft, before anything is drafted: planning
        waits for the stream, which has nothing to do yet.

        Args:
            work: (index, tokens drafted by then).
            pending: ``[bs]`` the token of each request whose KV is not computed yet.

        Precondition: until `run`, no other forward of the target's attention backend.

        Note:
            Shorter drafts are padded; the padding's KV lands in slots past the committed length
            that the next tokens overwrite, and nothing that is accepted attends to it.
        """
        device = batch.seq_lens.device
        indices = [i for i, _ in work]
        index, lengths = to_device(work, device).unbind(1)
        width = max(count for _, count in work) + 1
        requests, committed = batch.req_pool_indices[index], batch.seq_lens[index]
        input_ids = torch.empty((len(indices), width), dtype=torch.int64, device=device)
        input_ids[:, 0] = pending[index]
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
        self.model_runner.attn_backend.init_forward_metadata(forward_batch)
        return PreparedVerify(
            forward_batch, indices, index, requests, lengths, source_slots, input_ids
        )

    def run(self, prepared: PreparedVerify) -> Verified:
        """Read the drafted tokens and accept."""
        width = prepared.input_ids.shape[1]
        draft_tokens = self.drafts[prepared.requests, : width - 1]
        prepared.input_ids[:, 1:] = draft_tokens
        runner, batch = self.model_runner, prepared.forward_batch
        # SGLang's own way into an eager verify pass would plan it again.
        with (
            runner.eager_runner.model_context(),
            forward_context(ForwardContext(attn_backend=runner.attn_backend), forward_batch=batch),
            self.picker.active() as picked,
        ):
            runner.model.forward(batch.input_ids, batch.positions, batch)
        tokens = picked.tokens.view(-1, width)
        yields = accept_longest_prefix(draft_tokens, prepared.lengths, tokens)
        return Verified(tokens, yields, prepared.source_slots)
