"""StepAccount: rows and tokens of a scheduler step, counted by hand in the tests."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.metrics import DraftCounters
from sglang_vericache.pool.allocator import SlotAllocator
from sglang_vericache.pool.span import Span
from sglang_vericache.rounds.accounting import StepAccount
from sglang_vericache.rounds.policy import RoundPlan
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.tree.view import DraftView

BUDGET = Budget(0.2, None)


def state(span_rows: int = 268, tail_start: int = 1000, drafted: int = 0) -> RequestState:
    """A request whose spans keep ``span_rows`` of its first ``tail_start`` tokens."""
    allocator = SlotAllocator(0, "cpu")
    slots = torch.zeros(span_rows, dtype=torch.int64)
    span = Span(0, tail_start, slots, "path", allocator, BUDGET)
    view = DraftView(1, BUDGET, (span,))
    return RequestState("r", 1, None, 0, DraftCounters(), 900, 16, BUDGET, False, view, drafted)


def account(
    states, committed, reasons=None, plain=(), draft=(), verify=(), plain_steps=1
) -> StepAccount:
    plan = RoundPlan(tuple(plain), tuple(draft), tuple(verify))
    return StepAccount(states, committed, reasons or [None] * len(states), plan, plain_steps)


def test_a_round():
    """Catches rows that are one off. 1010 committed tokens, 268 rows of spans, 10 of the tail:
    drafts read 279, 280 and 281 rows, the verify pass 1010 + 4; three tokens come out, for which
    plain decoding would have read 1011, 1012 and 1013."""
    request, total = state(), DraftCounters()
    step = account([request], [1010], draft=[(0, 3)], verify=[(0, 3)])
    step.drafted([(0, 3)])
    step.settle([3], total)
    for counters in (request.counters, total):
        assert (counters.rounds, counters.drafted, counters.accepted) == (1, 3, 2)
        assert counters.draft_rows_read == 279 + 280 + 281
        assert counters.full_rows_read == 1014
        assert counters.rows_full == 1011 + 1012 + 1013
        assert counters.draft_rows_limit_exceeded == 0
        assert counters.tokens == 3


def test_drafting_over_several_steps():
    """Catches tokens drafted in earlier steps that are left out of the view's length."""
    request, total = state(drafted=8), DraftCounters()
    step = account([request], [1010], draft=[(0, 2)])
    step.drafted([(0, 2)])
    step.settle([0], total)
    assert total.rows_read == 287 + 288
    assert (total.rounds, total.accepted, total.rows_full, total.tokens) == (0, 0, 0, 0)


@pytest.mark.parametrize(("tokens", "accepted"), [(1, 0), (5, 4)], ids=["none", "all"])
def test_accepted_leaves_the_full_models_token_out(tokens, accepted):
    """Catches an acceptance that can exceed what was drafted, or fall below nothing."""
    request, total = state(), DraftCounters()
    step = account([request], [1010], verify=[(0, 4)])
    step.settle([tokens], total)
    assert (total.drafted, total.accepted, total.round_tokens) == (4, accepted, tokens)


def test_agreement_is_told():
    """Catches requests whose verifications teach the choice of horizons nothing, and plain steps
    taken for drafts that failed."""
    one, other, ended = state(), state(), state()
    ended.released = True
    step = account(
        [one, other, ended],
        [1010] * 3,
        [None, "grammar", None],
        plain=[1],
        verify=[(0, 16), (2, 16)],
    )
    step.settle([17, 1, 1], DraftCounters())
    assert one.agreement.value > 0.9
    assert not other.agreement.shown and not ended.agreement.shown


def test_plain_step():
    """Catches plain tokens without their reason, or counted as drafted."""
    request, total = state(), DraftCounters()
    account([request], [700], ["grammar"], plain=[0]).settle([1], total)
    assert total.plain == {"grammar": 1}
    assert (total.rows_read, total.rows_full) == (701, 701)
    assert (total.rounds, total.drafted, total.accepted, total.tokens) == (0, 0, 0, 1)


def test_requests_are_kept_apart():
    """Catches a batch whose requests are charged with each other's rows."""
    requests, total = [state(), state(), state()], DraftCounters()
    step = account(
        requests,
        [1010, 2000, 50],
        [None, None, "short_context"],
        plain=[2],
        draft=[(1, 1), (0, 2)],
        verify=[(1, 1)],
    )
    step.drafted([(1, 1), (0, 2)])
    step.settle([0, 2, 1], total)
    first, second, third = (request.counters for request in requests)
    assert (first.rows_read, first.rows_full, first.tokens) == (279 + 280, 0, 0)
    assert (second.rows_read, second.rows_full) == (268 + 1000 + 1 + 2002, 2001 + 2002)
    assert (second.drafted, second.accepted) == (1, 1)
    assert (third.rows_read, third.rows_full, third.plain) == (51, 51, {"short_context": 1})
    assert total.tokens == 0 + 2 + 1
    assert total.rows_read == first.rows_read + second.rows_read + third.rows_read


@pytest.mark.parametrize(("rows", "exceeded"), [(267, 0), (268, 0), (269, 3)])
def test_a_view_beyond_its_limit_is_reported(rows, exceeded):
    """Catches a watchdog that never barks: 1000 tokens at 0.2 may fill 200 + 68 rows."""
    request, total = state(span_rows=rows), DraftCounters()
    step = account([request], [1010], draft=[(0, 3)])
    step.drafted([(0, 3)])
    step.settle([0], total)
    assert total.draft_rows_limit_exceeded == exceeded


def test_every_request_needs_its_yield():
    """Catches yields of another step, which would be booked on the wrong requests."""
    with pytest.raises(ValueError):
        account([state(), state()], [10, 10]).settle([1], DraftCounters())


def test_a_released_request_is_not_counted():
    """Catches the step that was under way when its request ended, counted as its work."""
    gone, total = state(), DraftCounters()
    gone.released = True
    account([gone], [1000], verify=[(0, 4)]).settle([5], total)
    assert total == gone.counters == DraftCounters()


def test_settle_returns_the_step():
    """Catches SGLang's own averages over something else than this step: rounds and their tokens,
    the last round of each request for what lies behind its end."""
    requests, total = [state(), state(), state()], DraftCounters(rounds=5)
    step = account(requests, [1010, 1020, 1030], ["grammar", None, None], [0], verify=[(1, 4)])
    done = step.settle([1, 3, 0], total)
    assert (done.rounds, done.accepted, done.round_tokens, done.drafted) == (1, 2, 3, 4)
    assert done.yields == {3: 1} and done.plain == {"grammar": 1}
    assert total.rounds == 6
    last = [(request.last_yield, request.last_reason) for request in requests]
    assert last == [(1, "grammar"), (3, None), (0, None)]


def test_several_plain_steps():
    """Catches rows of the second plain token that do not count the first, and tokens behind the
    end of an output that stay counted, or are taken from rounds."""
    request, total = state(), DraftCounters()
    step = account([request], [700], ["short_context"], plain=[0], plain_steps=3)
    step.settle([3], total)
    assert total.plain == {"short_context": 3}
    assert (total.full_rows_read, total.rows_full) == (701 + 702 + 703, 701 + 702 + 703)
    assert (request.last_yield, request.last_reason) == (3, "short_context")
    total.cut(2, 702 + 703, request.last_yield, request.last_reason)
    assert total.plain == {"short_context": 1} and total.rows_full == 701
    assert (total.accepted, total.yields) == (0, {})


def test_drafting_ahead():
    """Catches rows of the next round counted from before the verification that precedes it. 1010
    committed tokens are 278 rows; the verification yields 4, so the drafts behind it read 283 and
    284."""
    request, total = state(drafted=3), DraftCounters()
    plan = RoundPlan((), (), ((0, 3),), ahead=((0, 2),))
    step = StepAccount([request], [1010], [None], plan)
    request.drafted = 0
    step.drafted([(0, 2)], ahead=True)
    request.drafted = 2
    step.settle([4], total)
    assert total.draft_rows_read == 283 + 284
    assert (total.rounds, total.drafted, total.accepted) == (1, 3, 3)


@pytest.mark.parametrize("released", [False, True])
def test_a_plain_step_counts_the_same_beside_a_round(released):
    """Catches another way of counting where nothing is drafted: the same plain requests beside
    one that verifies are counted one by one."""
    committed, reasons = [700, 900, 300], ["grammar", "short_context", None]
    counted = []
    for verify, yields in (((), [3, 2, 0]), (((2, 4),), [3, 2, 5])):
        requests, total = [state(), state(), state()], DraftCounters()
        requests[1].released = released
        step = account(
            requests, committed, reasons, plain=[0, 1], verify=verify, plain_steps=3
        ).settle(yields, total)
        assert step == total
        if verify:
            counters = requests[2].counters
            assert counters.full_rows_read == 300 + 5
            step.full_rows_read -= counters.full_rows_read
            step.rows_full -= counters.rows_full
        counted.append(
            (
                [request.counters for request in requests[:2]],
                [(request.last_yield, request.last_reason) for request in requests[:2]],
                (step.plain, step.full_rows_read, step.rows_full),
            )
        )
    assert counted[0] == counted[1]
