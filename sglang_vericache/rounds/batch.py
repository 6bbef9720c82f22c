"""The running requests as the choice of a horizon sees them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sglang_vericache.rounds.agreement import expected_yields


@dataclass(frozen=True)
class Batch:
    """Attributes:
    contexts: committed tokens of each request.
    remaining: tokens that each request may still make.
    drafters: places of those that may draft; the others are decoded plainly whatever is chosen.
    agreements: of the drafters that have drafted already.
    others: agreements that each drafter which has not is equally likely to have.
    without_view: drafters that would have to open a view.
    rotating: for some the full KV is not on the device: plain decoding is no choice, and what
        steps cost is not what limits them.
    token_by_token: some plain request cannot decode several tokens in one step.
    """

    contexts: Sequence[int]
    remaining: Sequence[int]
    drafters: Sequence[int]
    agreements: Any
    others: Any
    without_view: int = 0
    rotating: bool = False
    token_by_token: bool = False

    @property
    def requests(self) -> int:
        return len(self.contexts)

    @property
    def undrafted(self) -> int:
        return len(self.contexts) - len(self.drafters)

    @cached_property
    def context(self) -> int:
        return sum(self.contexts)

    @cached_property
    def drafting_context(self) -> int:
        if not self.undrafted:
            return self.context
        return sum(self.contexts[i] for i in self.drafters)

    def context_of(self, work: Sequence[tuple[int, int]]) -> int:
        """Of those requests, whose places come first in each pair."""
        if len(work) == len(self.contexts):
            return self.context
        return sum(self.contexts[place] for place, _ in work)

    @property
    def tokens_without_view(self) -> float:
        """Of context, of those that would have to open a view; they are like the others."""
        return self.context * self.without_view / max(self.requests, 1)

    @cached_property
    def left(self) -> int:
        """Tokens that all of them may still make."""
        return max(sum(self.remaining), 1)

    @property
    def left_each(self) -> float:
        """The same for one of them, on the mean."""
        return self.left / max(self.requests, 1)

    @cached_property
    def mean_agreement(self) -> float | None:
        known, unknown = len(self.agreements), len(self.drafters) - len(self.agreements)
        if not self.drafters:
            return None
        total = float(np.sum(self.agreements)) + unknown * float(np.mean(self.others))
        return total / (known + unknown)

    def tokens(self, horizon: int, hoped: float | None = None) -> float:
        """That a round of ``horizon`` yields over the time that requests like these take.

        A harmonic mean: those that agree well end soon, and what they gain ends with them, while
        those that agree badly are slowed down by every round that the others draft long.

        Args:
            hoped: instead of the agreement of those that have not drafted yet.
        """
        time = float((1 / expected_yields(self.agreements, horizon)).sum()) + self.undrafted
        unknown = len(self.drafters) - len(self.agreements)
        if unknown:
            others = self.others if hoped is None else np.array([hoped])
            time += unknown * float((1 / expected_yields(others, horizon)).mean())
        return self.requests**2 / time
