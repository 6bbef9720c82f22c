"""What the phases of rounds took, once it is known, for the costs of rounds. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_vericache.rounds.batch import Batch
from sglang_vericache.rounds.costs import RoundCosts, is_learnt
from sglang_vericache.rounds.linear_cost import Work

Told = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class _Phase:
    """Attributes:
    tokens: drafted by each request at most, or before a verification.
    """

    work: Work
    tokens: int
    seconds: float


class PhaseReports:
    """Keeps the last phase of each kind until the costs are to learn of it.

    A device tells late what a phase took, after its step and perhaps after its round. That is of no
    importance: a phase is told with what it computed, and any of them says as much about others.
    """

    def __init__(self, costs: RoundCosts) -> None:
        self._costs, self._rounds = costs, 0
        self._drafts: _Phase | None = None
        self._verify: _Phase | None = None

    def drafting(self, work: Sequence[tuple[int, int]], batch: Batch) -> Told:
        """To be told the seconds of drafting (place of a request, tokens) for each of ``work``."""
        tokens = max(count for _, count in work)
        asked = Work(1, len(work), batch.context_of(work))

        def told(seconds: float) -> None:
            # What begins a phase is spread over most steps in the longest.
            if self._drafts is None or tokens >= self._drafts.tokens:
                self._drafts = _Phase(asked, tokens, seconds)

        return told

    def verifying(self, work: Sequence[tuple[int, int]], batch: Batch) -> Told:
        """The same of verifying (place of a request, tokens drafted)."""
        tokens = max(drafted for _, drafted in work)
        asked = Work(tokens, len(work), batch.context_of(work))

        def told(seconds: float) -> None:
            self._verify = _Phase(asked, tokens, seconds)

        return told

    def pass_on(self) -> None:
        """One of each kind a round at most: to learn from more would take the host longer."""
        self._rounds += self._drafts is not None
        if self._drafts is not None and is_learnt(self._rounds):
            self._costs.drafts.observe(
                self._drafts.work, self._drafts.seconds / self._drafts.tokens
            )
        if self._verify is not None:
            self._costs.verifies.observe(self._verify.work, self._verify.seconds)
        self._drafts = self._verify = None
