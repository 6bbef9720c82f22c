"""What the requests of a batch yield in one scheduler step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult

from sglang_vericache.draft_input import PendingTokens
from sglang_vericache.plain.decoder import PlainStep
from sglang_vericache.plain.outputs import spread_output
from sglang_vericache.verify.verifier import Verified


class Emission:
    """Starts with nothing: a request that is added nowhere keeps its pending token.

    Args:
        pending: ``[bs]`` the tokens whose KV is not computed yet.
        width: most tokens that a request can yield.
    """

    def __init__(self, batch: ScheduleBatch, pending: torch.Tensor, width: int) -> None:
        size, device = len(batch.reqs), batch.seq_lens.device
        self.tokens = torch.zeros((size, width), dtype=torch.int64, device=device)
        self.yields = torch.zeros(size, dtype=torch.int64, device=device)
        self.pending = pending.clone()
        self.output = LogitsProcessorOutput(next_token_logits=None)

    def add_verified(self, index: torch.Tensor, verified: Verified) -> None:
        self.tokens[index, : verified.tokens.shape[1]] = verified.tokens
        self.yields[index] = verified.yields
        last = verified.tokens.gather(1, verified.yields[:, None] - 1)
        self.pending[index] = last[:, 0]

    def add_plain(self, index: torch.Tensor, indices: Sequence[int], step: PlainStep) -> None:
        tokens = step.tokens.to(torch.int64)
        self.tokens[index, 0] = tokens
        self.yields[index] = 1
        self.pending[index] = tokens
        size, width = self.tokens.shape
        self.output = spread_output(step.output, index, indices, size, width)

    def result(self, batch: ScheduleBatch, on_publish) -> GenerationBatchResult:
        new_seq_lens = batch.seq_lens + self.yields
        if on_publish is not None:
            on_publish(new_seq_lens)
        return GenerationBatchResult(
            logits_output=self.output,
            next_token_ids=self.tokens.flatten(),
            accept_lens=self.yields.to(torch.int32),
            new_seq_lens=new_seq_lens,
            next_draft_input=PendingTokens(self.pending),
            speculative_num_draft_tokens=self.tokens.shape[1],
            # A step may accept nothing, and SGLang subtracts this before it counts.
            num_non_draft_tokens_per_req=0,
        )
