"""Verify passes as CUDA graphs, for some batch sizes at a few widths.

A pass of small batches is bound by its launches: hundreds, of a few microseconds each. What
surrounds the forward is captured with it, from the drafted tokens to the accept counts.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_vericache.graph_capture import GraphCapture, open_capture
from sglang_vericache.verify.accept import accept_longest_prefix
from sglang_vericache.verify.cascade_plan import CascadePlan
from sglang_vericache.verify.chain_input import chain_verify_input
from sglang_vericache.verify.chain_plan import ChainPlan
from sglang_vericache.verify.row_attention import RowAttention, RowPlan
from sglang_vericache.verify.token_picker import TokenPicker

logger = logging.getLogger(__name__)

# Larger batches are padded up to the next of these: padding costs a pass no KV.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclass(frozen=True)
class CapturedVerify:
    """Attributes as in `verifier.Verified`, padded to the captured size, at fixed addresses."""

    tokens: torch.Tensor
    yields: torch.Tensor
    source_slots: torch.Tensor


def fits_workspace(plan: ChainPlan | RowPlan) -> bool:
    """Whether FlashInfer has room for the partial results of a captured pass: it reserves them for
    every tile of queries there may be, an uncaptured pass only for those that it splits."""
    try:
        plan.plan(())
    except RuntimeError as error:
        if "workspace" not in str(error):
            raise
        return False
    return True


class VerifyGraphs:
    """Replays verify passes; what differs between them is read from static tensors.

    Args:
        drafts: ``[R, horizon + 1]`` int64, the drafted tokens by request row.
        widths: tokens of a request to capture, ascending.
        most: largest batch.
        kv_indices: ``[N]`` int32, memory for the list of slots that a pass reads; None where
            nothing asks for one.
        max_position: last position that the model's rotary embedding knows.
        row_attention: what attends in place of the target's backend, where that is wanted.

    Attributes:
        requests, pending, committed, lengths: ``[most]`` int64, see `load`.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        drafts: torch.Tensor,
        picker: TokenPicker,
        widths: Sequence[int],
        most: int,
        kv_indices: torch.Tensor | None,
        max_position: int,
        row_attention: RowAttention | None = None,
    ) -> None:
        self.model_runner, self.drafts, self.picker = model_runner, drafts, picker
        self.widths, self.kv_indices = sorted(widths), kv_indices
        self.row_attention = row_attention
        self.sizes = [size for size in SIZES if size < most] + [most]
        self.max_position = max_position
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        # requests, pending tokens, committed and drafted lengths
        self._state = torch.zeros((4, most), dtype=torch.int64, device=drafts.device)
        self.requests, self.pending, self.committed, self.lengths = self._state.unbind()
        self._plans: dict[tuple[int, int], ChainPlan | RowPlan] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._results: dict[tuple[int, int], CapturedVerify] = {}
        # A graph goes on writing to the inputs that it was captured with: given back, their memory
        # would be other passes' plans.
        self._inputs: dict[tuple[int, int], ForwardBatch] = {}
        self._cascades: dict[int, CascadePlan] = {}

    def capture(self) -> None:
        shapes = [(s, w) for s in reversed(self.sizes) for w in reversed(self.widths)]
        what = f"verify CUDA graphs: bs={self.sizes}, widths={self.widths}"
        with open_capture(what) as capture:
            for shape in shapes:
                self._capture(*shape, capture)
        left_out = sorted(shape for shape in shapes if shape not in self._graphs)
        if left_out:
            logger.warning(
                "FlashInfer's workspace is too small to capture verify passes of (requests, tokens)"
                " %s; they run uncaptured. SGLANG_FLASHINFER_WORKSPACE_SIZE sets its bytes.",
                left_out,
            )

    def warm_up_cascade(self) -> None:
        """Compile what only a pass with groups runs, on padding."""
        shape = min((shape for shape in self._plans if shape[0] > 1), default=None)
        if shape is not None:
            none = self.requests[:0]
            self.load(shape, none, none, none, none)
            self.run(shape, (), [(2, 0)])

    def shape_for(self, committed: Sequence[int], width: int) -> tuple[int, int] | None:
        """The captured (size, width) that a pass is padded to, or None when none is as large.

        Args:
            committed: tokens of its requests whose KV is computed.
        """
        at = bisect.bisect_left(self.sizes, len(committed))
        column = bisect.bisect_left(self.widths, width)
        if at == len(self.sizes) or column == len(self.widths):
            return None
        shape = self.sizes[at], self.widths[column]
        plan = self._plans.get(shape)
        return shape if plan is not None and plan.fits(committed) else None

    def load(
        self,
        shape: tuple[int, int],
        requests: torch.Tensor,
        pending: torch.Tensor,
        committed: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        """Set the state of n requests, and padding up to the captured size: row 0, which is
        padding in every table, with nothing committed.

        Args:
            requests: ``[n]`` rows of the request tables.
            pending: ``[n]`` tokens whose KV is not computed yet.
            committed, lengths: ``[n]`` tokens committed, and drafted since.
        """
        count = requests.shape[0]
        self._state[:, :count] = torch.stack([requests, pending, committed, lengths])
        self._state[:, count : shape[0]] = 0

    def run(
        self,
        shape: tuple[int, int],
        committed: Sequence[int],
        groups: Sequence[tuple[int, int]] = (),
    ) -> CapturedVerify:
        """Read the drafted tokens of the loaded requests and accept.

        Args:
            committed: on the host, for FlashInfer's plan.
            groups: (requests, shared tokens) of those that come first and read a prefix together:
                such a pass is launched kernel by kernel, on what a captured one reads.
        """
        if groups:
            size, width = shape
            cascade = self._cascade_of(width)
            cascade.plan(committed, groups, size)
            return self._pass(cascade, self._inputs[shape], size, width)
        self._plans[shape].plan(committed)
        self._graphs[shape].replay()
        return self._results[shape]

    def _cascade_of(self, width: int) -> CascadePlan:
        if width not in self._cascades:
            assert self.kv_indices is not None
            self._cascades[width] = CascadePlan(self.model_runner, width, self.kv_indices)
        return self._cascades[width]

    def _plan_of(self, size: int, width: int) -> ChainPlan | RowPlan:
        if self.row_attention is not None:
            return RowPlan(self.row_attention, width)
        assert self.kv_indices is not None
        return ChainPlan(self.model_runner, size, width, self.kv_indices)

    def _capture(self, size: int, width: int, capture: GraphCapture) -> None:
        shape = size, width
        none = self.requests[:0]
        self.load(shape, none, none, none, none)
        plan = self._plan_of(size, width)
        if not fits_workspace(plan):
            return
        batch = self._inputs[shape] = self._static_batch(size, width)
        graph, result = capture(lambda: self._pass(plan, batch, size, width))
        self._plans[shape], self._graphs[shape], self._results[shape] = plan, graph, result

    def _pass(
        self,
        plan: ChainPlan | CascadePlan | RowPlan,
        batch: ForwardBatch,
        size: int,
        width: int,
    ) -> CapturedVerify:
        requests, committed = self.requests[:size], self.committed[:size]
        drafted = self.drafts[requests, : width - 1]
        batch.input_ids.view(size, width)[:, 0] = self.pending[:size]
        batch.input_ids.view(size, width)[:, 1:] = drafted
        places = committed[:, None] + torch.arange(width, device=committed.device)
        batch.positions.copy_(places.clamp(max=self.max_position).flatten())
        slots = self.req_to_token[requests[:, None], places].to(torch.int64)
        batch.out_cache_loc.copy_(slots.flatten())
        plan.fill_indices(self.req_to_token, requests, committed)
        runner = self.model_runner
        plan.backend.forward_metadata = plan.metadata
        with (
            runner.eager_runner.model_context(),
            forward_context(ForwardContext(attn_backend=plan.backend), forward_batch=batch),
            self.picker.active() as picked,
        ):
            runner.model.forward(batch.input_ids, batch.positions, batch)
        tokens = picked.tokens.view(size, width)
        yields = accept_longest_prefix(drafted, self.lengths[:size], tokens)
        return CapturedVerify(tokens, yields, slots)

    def _static_batch(self, size: int, width: int) -> ForwardBatch:
        def column() -> torch.Tensor:
            return torch.zeros(size * width, dtype=torch.int64, device=self.drafts.device)

        tokens, positions = column(), column()
        batch = ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=size,
            input_ids=tokens,
            req_pool_indices=self.requests[:size],
            seq_lens=self.committed[:size],
            out_cache_loc=column(),
            seq_lens_sum=None,
            positions=positions,
            return_logprob=False,
            spec_algorithm=self.model_runner.spec_algorithm,
            spec_info=chain_verify_input(tokens, positions, width),
            capture_hidden_mode=CaptureHiddenMode.NULL,
            global_num_token_non_padded_cpu=size * width,
        )
        self.model_runner.kv_index_translator.bind_runner_slots(batch)
        return batch
