"""What a speculative worker carries from one scheduler step to the next."""

from __future__ import annotations

import torch
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType


class PendingTokens(SpecInput):
    """The last token of each running request: known, but its KV is not computed yet.

    Under overlap scheduling SGLang relays ``bonus_tokens`` through its future map and sets
    ``future_indices``; the other relay attributes of eagle drafts stay None.

    Args:
        tokens: ``[bs]``.
    """

    topk_p = topk_index = hidden_states = draft_probs = None

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__(SpecInputType.EAGLE_DRAFT)
        self.bonus_tokens = tokens
        self.future_indices: torch.Tensor | None = None
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1

    def filter_batch(
        self, new_indices: torch.Tensor, new_indices_cpu: list[int] | None = None
    ) -> None:
        self.bonus_tokens = self.bonus_tokens[new_indices]
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]

    def merge_batch(self, other: PendingTokens) -> None:
        self.bonus_tokens = torch.cat([self.bonus_tokens, other.bonus_tokens])
        if self.future_indices is not None:
            self.future_indices = torch.cat([self.future_indices, other.future_indices])
