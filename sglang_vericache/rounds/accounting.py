"""Counting a scheduler step: known on the host except for the yields, which come later."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_vericache.metrics import DraftCounters
from sglang_vericache.rounds.policy import RoundPlan
from sglang_vericache.rounds.request_state import RequestState


def rows_of_plain_decoding(first: int, tokens: int) -> int:
    """Rows that plain decoding reads for ``tokens`` tokens, ``first`` of them for the first."""
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
        self.states, self.committed, self.reasons, self.plan = states, committed, reasons, plan
        self.counters = [DraftCounters() for _ in states]
        for i in plan.plain:
            reason = reasons[i]
            assert reason is not None, "a request that could draft is not decoded plainly"
            self.counters[i].plain[reason] += plain_steps
            rows = rows_of_plain_decoding(committed[i] + 1, plain_steps)
            self.counters[i].full_rows_read += rows
        for i, drafted in plan.verify:
            self.counters[i].rounds += 1
            self.counters[i].drafted += drafted
            self.counters[i].full_rows_read += committed[i] + drafted + 1

    def drafted(self, work: Sequence[tuple[int, int]]) -> None:
        """Draft steps of (index, count) just ran; to be told before their states advance."""
        for i, count in work:
            state, committed = self.states[i], self.committed[i]
            view = state.view
            assert view is not None, "nothing drafts without a view"
            tail = view.tail_tokens(committed) + state.drafted
            first = view.span_rows + tail + 1
            self.counters[i].draft_rows_read += count * first + count * (count - 1) // 2
            if view.span_rows > view.budget.limit_rows(view.tail_start):
                self.counters[i].draft_rows_limit_exceeded += count

    def settle(self, yields: Sequence[int], total: DraftCounters) -> DraftCounters:
        """Add this step to its requests and to the total, now that the yields are known.

        Returns:
            What the step did, all requests together.
        """
        verified = {i for i, _ in self.plan.verify}
        step = DraftCounters()
        for i, (state, tokens) in enumerate(zip(self.states, yields, strict=True)):
            if state.released:
                continue
            counters = self.counters[i]
            if i in verified:
                counters.accepted += tokens - 1
                counters.yields[tokens] += 1
                state.last_yield, state.last_reason = tokens, None
            elif tokens:
                state.last_yield, state.last_reason = tokens, self.reasons[i]
            counters.rows_full += rows_of_plain_decoding(self.committed[i] + 1, tokens)
            state.counters.add(counters)
            step.add(counters)
        total.add(step)
        return step
