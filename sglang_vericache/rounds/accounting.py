"""Counting a scheduler step: known on the host except for the yields, which come later."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_vericache.metrics import DraftCounters
from sglang_vericache.rounds.policy import RoundPlan
from sglang_vericache.rounds.request_state import RequestState


def rows_of_steps(first: int, tokens: int) -> int:
    """Rows that so many steps read, each one more than the one before: ``first`` for the first."""
    return tokens * first + tokens * (tokens - 1) // 2


class StepAccount:
    """One step of a batch, with ``plain_steps`` tokens for each that is decoded plainly.

    Rows are KV rows per layer and kv head: a draft step reads the view, a verify pass and a
    plain step read the full KV once.
    """

    def __init__(
        self,
        states: Sequence[RequestState],
        committed: Sequence[int],
        reasons: Sequence[str | None],
        plan: RoundPlan,
        plain_steps: int = 1,
    ) -> None:
        undrafted = all(reasons[i] is not None for i in plan.plain)
        assert undrafted, "a request that could draft is not decoded plainly"
        self.states, self.committed, self.reasons, self.plan = states, committed, reasons, plan
        self.plain_steps = plain_steps
        # Tokens drafted, and rows that the first of them reads: those that are drafted ahead read
        # what the verification before them yields as well.
        self._drafting: dict[int, tuple[int, int]] = {}
        self._ahead: dict[int, tuple[int, int]] = {}
        self._beyond_limit: dict[int, int] = {}  # draft steps

    def drafted(self, work: Sequence[tuple[int, int]], ahead: bool = False) -> None:
        """Draft steps of (index, count) just ran; to be told before their states advance.

        Args:
            ahead: behind the verification of this step.
        """
        for i, count in work:
            state = self.states[i]
            view = state.view
            assert view is not None, "nothing drafts without a view"
            first = view.length(self.committed[i]) + state.drafted + 1
            (self._ahead if ahead else self._drafting)[i] = count, first
            if view.span_rows > view.budget.folded_limit_rows(view.tail_start):
                self._beyond_limit[i] = count

    def settle(self, yields: Sequence[int], total: DraftCounters) -> DraftCounters:
        """Add this step to its requests and to the total, now that the yields are known.

        Returns:
            What the step did, all requests together.

        Raises:
            ValueError: the yields are of another step.
        """
        if len(yields) != len(self.states):
            raise ValueError(f"{len(yields)} yields of {len(self.states)} requests")
        step = DraftCounters()
        self._settle_plain(yields, step)
        verified = dict(self.plan.verify)
        for i in sorted({*verified, *self._drafting, *self._ahead}):
            state, tokens, committed = self.states[i], yields[i], self.committed[i]
            if state.released:
                continue
            counters, full_rows = state.counters, 0
            if i in verified:
                drafted = verified[i]
                full_rows = committed + drafted + 1
                counters.count_round(drafted, tokens)
                step.count_round(drafted, tokens)
                state.agreement.add(drafted, tokens - 1)
                state.last_yield, state.last_reason = tokens, None
            count, first = self._drafting.get(i, (0, 0))
            draft_rows = rows_of_steps(first, count)
            count, first = self._ahead.get(i, (0, 0))
            draft_rows += rows_of_steps(first + tokens, count)
            rows_full = rows_of_steps(committed + 1, tokens) if tokens else 0
            counters.count_rows(draft_rows, full_rows, rows_full)
            step.count_rows(draft_rows, full_rows, rows_full)
            if i in self._beyond_limit:
                counters.draft_rows_limit_exceeded += self._beyond_limit[i]
                step.draft_rows_limit_exceeded += self._beyond_limit[i]
        total.add(step)
        return step

    def _settle_plain(self, yields: Sequence[int], step: DraftCounters) -> None:
        """Of those that are decoded plainly, which draft nothing. With hundreds of requests this is
        to cost little: SGLang's own steps count nothing."""
        steps = self.plain_steps
        rows = rows_full = 0
        for i in self.plan.plain:
            state, tokens, first = self.states[i], yields[i], self.committed[i] + 1
            if state.released:
                continue
            counters, reason = state.counters, self.reasons[i] or ""
            read = rows_of_steps(first, steps)
            usual = read if tokens == steps else rows_of_steps(first, tokens)
            counters.plain[reason] += steps
            step.plain[reason] += steps
            counters.full_rows_read += read
            counters.rows_full += usual
            rows += read
            rows_full += usual
            state.last_yield, state.last_reason = tokens, reason
        step.count_rows(0, rows, rows_full)
