"""What the requests of a batch yield in one scheduler step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult

from sglang_vericache.draft_input import PendingTokens
from sglang_vericache.plain.decoder import PlainTokens
from sglang_vericache.plain.outputs import spread_output
from sglang_vericache.verify.verifier import Verified


class Emission:
    """Starts with nothing: a request that is added nowhere keeps its pending token.

    Nothing here waits for the device. A number assigned through an index tensor would: torch
    copies it there from pageable memory.

    Args:
        pending: ``[bs]`` the tokens whose KV is not computed yet.
        width: most tokens that a request can yield.
        on_publish: takes the new lengths; the scheduler prepares its next step as soon as the
            device has them.
    """

    def __init__(
        self, batch: ScheduleBatch, pending: torch.Tensor, width: int, on_publish: Any
    ) -> None:
        size, device = len(batch.reqs), batch.seq_lens.device
        self.tokens = torch.zeros((size, width), dtype=torch.int64, device=device)
        self.yields = torch.zeros(size, dtype=torch.int64, device=device)
        self.pending = pending.clone()
        self.output = LogitsProcessorOutput(next_token_logits=None)
        self._on_publish = on_publish
        self._lengths = batch.seq_lens
        self._new_lengths: torch.Tensor | None = None

    @property
    def new_lengths(self) -> torch.Tensor:
        """``[bs]`` committed tokens after this step.

        Precondition: they are published.
        """
        assert self._new_lengths is not None, "published once a step"
        return self._new_lengths

    def publish(self, plain: torch.Tensor | None = None, plain_steps: int = 0) -> None:
        """Announce the new lengths, as soon as all yields are known: those of a step that
        verifies nothing before it runs.

        Args:
            plain: places of the requests that will yield ``plain_steps`` tokens each.
        """
        if plain is not None:
            self.yields.index_fill_(0, plain, plain_steps)
        self._new_lengths = self._lengths + self.yields
        if self._on_publish is not None:
            self._on_publish(self._new_lengths)

    def add_verified(self, index: torch.Tensor, verified: Verified) -> None:
        self.tokens[index, : verified.tokens.shape[1]] = verified.tokens
        self.yields[index] = verified.yields
        last = verified.tokens.gather(1, verified.yields[:, None] - 1)
        self.pending[index] = last[:, 0]

    def add_plain(self, index: torch.Tensor, indices: Sequence[int], plain: PlainTokens) -> None:
        """Precondition: `publish` was told of them."""
        steps = plain.tokens.shape[1]
        self.tokens[index, :steps] = plain.tokens
        self.pending[index] = plain.tokens[:, -1]
        if steps == 1:
            size, width = self.tokens.shape
            self.output = spread_output(plain.output, index, indices, size, width)

    def result(self) -> GenerationBatchResult:
        return GenerationBatchResult(
            logits_output=self.output,
            next_token_ids=self.tokens.flatten(),
            accept_lens=self.yields.to(torch.int32),
            new_seq_lens=self.new_lengths,
            next_draft_input=PendingTokens(self.pending),
            speculative_num_draft_tokens=self.tokens.shape[1],
            # A step may accept nothing, and SGLang subtracts this before it counts.
            num_non_draft_tokens_per_req=0,
        )
