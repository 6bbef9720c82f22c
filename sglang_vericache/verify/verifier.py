"""The verify pass: all drafted tokens of some requests in one forward over the full KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_vericache.config import BACKEND, TRITON
from sglang_vericache.sub_batch import sub_batch
from sglang_vericache.upload import to_device
from sglang_vericache.verify.accept import accept_longest_prefix
from sglang_vericache.verify.chain_input import chain_verify_input, fixed_width
from sglang_vericache.verify.chain_plan import plans_on_host
from sglang_vericache.verify.graphs import VerifyGraphs
from sglang_vericache.verify.row_attention import RowAttention
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
class EagerPass:
    """What an uncaptured pass at width w runs on.

    Attributes:
        input_ids: ``[n, w]``, whose memory the forward batch reads.
    """

    forward_batch: ForwardBatch
    source_slots: torch.Tensor
    input_ids: torch.Tensor


@dataclass(frozen=True)
class PreparedVerify:
    """A verify pass of n requests, but for the drafted tokens.

    Attributes:
        indices, index: places of the requests in the batch, on the host and ``[n]`` int64.
        requests: ``[n]`` rows of the request tables.
        lengths: ``[n]`` int64 drafted tokens of each.
        pending, committed: ``[n]`` int64, and the latter on the host.
        shape: of the captured pass that stands for it, None when `eager` does.
        groups: (requests, shared tokens) of those that come first and read a prefix together.
    """

    indices: Sequence[int]
    index: torch.Tensor
    requests: torch.Tensor
    lengths: torch.Tensor
    pending: torch.Tensor
    committed: torch.Tensor
    committed_cpu: Sequence[int]
    shape: tuple[int, int] | None = None
    groups: Sequence[tuple[int, int]] = ()
    eager: EagerPass | None = None


class Verifier:
    """Runs the target model on pending and drafted tokens, and accepts.

    Args:
        drafts: ``[R, horizon]`` int64, the drafted tokens by request row.
        max_position: last position that the model's rotary embedding knows.
        row_attention: what attends in place of the target's backend, where that is wanted.

    Attributes:
        graphs: captured passes; None runs all eagerly.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        drafts: torch.Tensor,
        picker: TokenPicker,
        max_position: int,
        row_attention: RowAttention | None = None,
    ) -> None:
        self.model_runner, self.drafts, self.picker = model_runner, drafts, picker
        self.max_position, self.row_attention = max_position, row_attention
        self.backend = row_attention or model_runner.attn_backend
        self._fixed_width = fixed_width(self.backend)
        self.graphs: VerifyGraphs | None = None

    @property
    def attention(self) -> str:
        """What attends in the passes, as ``--vericache-verify-attention`` calls it."""
        return BACKEND if self.row_attention is None else TRITON

    @property
    def reads_prefixes_once(self) -> bool:
        """Whether a pass can be given groups."""
        return self.graphs is not None and self.graphs.kv_indices is not None

    def capture(self, widths: Sequence[int], most: int, cascade: bool = False) -> None:
        """Capture passes of up to ``most`` requests, where the backend's plan can be made here.

        Args:
            cascade: prefixes may be read together, which is prepared as well.
        """
        flashinfer = plans_on_host(self.model_runner)
        if not flashinfer and self.row_attention is None:
            return
        self.graphs = VerifyGraphs(
            self.model_runner,
            self.drafts,
            self.picker,
            widths,
            most,
            self.model_runner.attn_backend.cuda_graph_kv_indices[0] if flashinfer else None,
            self.max_position,
            self.row_attention,
        )
        self.graphs.capture()
        if cascade and flashinfer:
            self.graphs.warm_up_cascade()

    def prepare(
        self,
        batch: ScheduleBatch,
        work: Sequence[tuple[int, int]],
        pending: torch.Tensor,
        groups: Sequence[tuple[int, int]] = (),
    ) -> PreparedVerify:
        """Plan a pass at the width of the longest draft, before anything is drafted: an eager
        pass is planned here, which waits for the stream, and that has nothing to do yet.

        Args:
            work: (index, tokens drafted by then).
            pending: ``[bs]`` the token of each request whose KV is not computed yet.
            groups: (requests, shared tokens) of those that come first in ``work`` and read a prefix
                together, where the pass can.

        Precondition: until `run`, no other forward of the target's attention backend.

        Note:
            Shorter drafts are padded; the padding's KV lands in slots past the committed length
            that the next tokens overwrite, and nothing that is accepted attends to it.
        """
        indices = [i for i, _ in work]
        index, lengths = to_device(work, batch.seq_lens.device).unbind(1)
        width = max(count for _, count in work) + 1
        committed_cpu = batch.seq_lens_cpu[indices]
        prepared = PreparedVerify(
            indices,
            index,
            batch.req_pool_indices[index],
            lengths,
            pending[index],
            batch.seq_lens[index],
            committed_cpu.tolist(),
        )
        if self.graphs is not None:
            shape = self.graphs.shape_for(prepared.committed_cpu, width)
            if shape is not None:
                return replace(prepared, shape=shape, groups=groups)
        width = self._fixed_width or width
        return replace(prepared, eager=self._prepare_eagerly(batch, prepared, width, committed_cpu))

    def _prepare_eagerly(
        self, batch: ScheduleBatch, prepared: PreparedVerify, width: int, committed_cpu
    ) -> EagerPass:
        device = batch.seq_lens.device
        requests, committed = prepared.requests, prepared.committed
        input_ids = torch.empty((requests.shape[0], width), dtype=torch.int64, device=device)
        input_ids[:, 0] = prepared.pending
        positions = committed[:, None] + torch.arange(width, device=device)
        table = batch.req_to_token_pool.req_to_token
        source_slots = table[requests[:, None], positions].to(torch.int64)
        part = sub_batch(
            batch,
            prepared.indices,
            prepared.index,
            ForwardMode.TARGET_VERIFY,
            committed,
            input_ids.flatten(),
            source_slots.flatten(),
        )
        part.seq_lens_cpu = committed_cpu
        positions = positions.clamp(max=self.max_position).flatten()
        part.spec_info = chain_verify_input(part.input_ids, positions, width)
        forward_batch = ForwardBatch.init_new(
            part,
            self.model_runner,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            return_hidden_states_before_norm=False,
        )
        self.backend.init_forward_metadata(forward_batch)
        return EagerPass(forward_batch, source_slots, input_ids)

    def run(self, prepared: PreparedVerify) -> Verified:
        """Read the drafted tokens and accept."""
        if prepared.eager is None:
            return self._replay(prepared)
        eager = prepared.eager
        width = eager.input_ids.shape[1]
        draft_tokens = self.drafts[prepared.requests, : width - 1]
        eager.input_ids[:, 1:] = draft_tokens
        runner, batch = self.model_runner, eager.forward_batch
        # SGLang's own way into an eager verify pass would plan it again.
        with (
            runner.eager_runner.model_context(),
            forward_context(ForwardContext(attn_backend=self.backend), forward_batch=batch),
            self.picker.active() as picked,
        ):
            runner.model.forward(batch.input_ids, batch.positions, batch)
        tokens = picked.tokens.view(-1, width)
        yields = accept_longest_prefix(draft_tokens, prepared.lengths, tokens)
        return Verified(tokens, yields, eager.source_slots)

    def _replay(self, prepared: PreparedVerify) -> Verified:
        assert self.graphs is not None and prepared.shape is not None
        self.graphs.load(
            prepared.shape,
            prepared.requests,
            prepared.pending,
            prepared.committed,
            prepared.lengths,
        )
        found = self.graphs.run(prepared.shape, prepared.committed_cpu, prepared.groups)
        count = len(prepared.indices)
        return Verified(found.tokens[:count], found.yields[:count], found.source_slots[:count])
