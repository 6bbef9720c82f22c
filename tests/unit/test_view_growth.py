"""Views grow where drafts fail: whose, by how much, and never at the others' expense."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.rounds.agreement import Agreement, SharedAgreement
from sglang_vericache.rounds.view_growth import (
    JUDGED_TOKENS,
    LOW_AGREEMENT,
    MOST_REQUESTS,
    MOST_TOKENS,
    WORTH_TOKENS,
    Failing,
    choose,
    drafts_fail,
    larger,
)

HORIZON = 7
ROOMY = 10**6


def agreement_of(value: float, judged: int) -> Agreement:
    agreement = Agreement()
    agreement.value, agreement.judged_at_size = value, judged
    return agreement


@pytest.mark.parametrize(
    ("value", "judged", "left", "fails"),
    [
        (0.5, JUDGED_TOKENS, WORTH_TOKENS, True),
        (0.5, JUDGED_TOKENS - 1, 400, False),
        (0.5, 200, WORTH_TOKENS - 1, False),
        (LOW_AGREEMENT, 200, 400, False),
    ],
)
def test_when_drafts_fail(value, judged, left, fails):
    """Catches views replaced on a hunch, or for a handful of tokens."""
    assert drafts_fail(agreement_of(value, judged), left) == fails


@pytest.mark.parametrize(
    ("budget", "tokens", "most", "rows"),
    [
        (Budget(0.2, None), 1000, ROOMY, [400, 800, 1000]),
        (Budget(0.7, None), 1000, ROOMY, [1000]),
        (Budget(0.95, None), 1000, ROOMY, []),
        (Budget(0.2, None, least_rows=500), 1000, ROOMY, [1000]),
        (Budget(0.2, None, least_rows=1024), 4096, ROOMY, [2048, 4096]),
        (Budget(0.2, None), 10_000, 5000, [4000, 5000]),
        (Budget(0.2, None), 10_000, 2100, []),
    ],
    ids=str,
)
def test_shares_double(budget, tokens, most, rows):
    """Catches a share of the ratio where a least number holds, a view wider than its row, and a
    selection anew for next to nothing."""
    found = []
    while (budget := larger(budget, tokens, most)) is not None:
        found.append(budget.asked_rows(tokens))
        assert found[-1] <= most
        assert found[-1] <= budget.limit_rows(tokens)
        # A path that grows keeps its share, and never less than before.
        assert budget.asked_rows(2 * tokens) >= min(found[-1], most)
    assert found == rows


def failing(place: int, agreement: float = 0.5, tokens: int = 1000, rows: int = 400, ready=True):
    return Failing(place, agreement, tokens, rows, ready)


def test_who_comes_first():
    """Those that have waited, then those that agree least."""
    many = [failing(0, 0.8), failing(1, 0.3, ready=False), failing(2, 0.6), failing(3, 0.7)]
    assert choose(many, ROOMY) == [2, 3, 0, 1]


def test_what_a_step_builds_is_bounded():
    """Catches a step that selects the views of a whole batch, and a context so long that its view
    would never grow."""
    assert len(choose([failing(i, tokens=100) for i in range(300)], ROOMY)) == MOST_REQUESTS
    half = MOST_TOKENS // 2
    assert len(choose([failing(i, tokens=half) for i in range(9)], ROOMY)) == 2
    assert choose([failing(i, tokens=4 * MOST_TOKENS) for i in range(9)], ROOMY) == [0]


def test_only_spare_slots_are_taken():
    """Catches a small view that waits behind a large one, and slots that are counted twice."""
    some = [failing(0, 0.1, rows=900), failing(1, 0.2, rows=300), failing(2, 0.3, rows=300)]
    assert choose(some, 899) == [1, 2]
    assert choose(some, 599) == [1]
    assert choose(some, 0) == choose(some, -50) == []


@dataclass
class Request:
    """Drafts stand with a chance of 1 - miss * (1 - kept share)."""

    miss: float
    tokens: int
    budget: Budget
    left: int
    agreement: Agreement
    sizes: list[int] = field(default_factory=list)

    @property
    def truth(self) -> float:
        return 1 - self.miss * (1 - self.budget.asked_rows(self.tokens) / self.tokens)

    def round(self, rng: random.Random) -> None:
        accepted = 0
        while accepted < HORIZON and rng.random() < self.truth:
            accepted += 1
        self.agreement.add(HORIZON, accepted)
        self.tokens += accepted + 1
        self.left -= accepted + 1


def run(misses: list[float], seed: int, slots: int, output: int = 600, tokens: int = 3000):
    """Rounds of all requests together until they have ended; (requests, tokens of each round)."""
    rng, shared = random.Random(seed), SharedAgreement()
    running = requests = [
        Request(miss, tokens, Budget(0.2, None), output, Agreement(shared)) for miss in misses
    ]
    yields = []
    while running:
        held = sum(r.budget.path_rows(r.tokens) for r in running)
        some, budgets = [], {}
        for i, one in enumerate(running):
            budget = larger(one.budget, one.tokens, ROOMY)
            if drafts_fail(one.agreement, one.left) and budget is not None:
                budgets[i] = budget
                rows = budget.path_rows(one.tokens)
                some.append(Failing(i, one.agreement.value, one.tokens, rows, True))
        grows = choose(some, slots - held)
        assert len(grows) <= MOST_REQUESTS
        for i in grows:
            running[i].budget = budgets[i]
            running[i].sizes.append(budgets[i].asked_rows(running[i].tokens))
            running[i].agreement.view_grew()
        assert sum(r.budget.path_rows(r.tokens) for r in running) <= max(slots, held)
        before = [one.left for one in running]
        for one in running:
            one.round(rng)
        yields.append(sum(b - one.left for b, one in zip(before, running, strict=True)))
        running = [one for one in running if one.left > 0]
    return requests, yields


@pytest.mark.parametrize("seed", range(5))
def test_those_that_fail_grow_until_they_do_not(seed):
    """Catches good requests that grow, bad ones that do not or only once, and a growth that is
    judged by what was seen before it."""
    requests, _ = run([0.05] * 8 + [0.5] * 8, seed, slots=ROOMY)
    for one in requests:
        if one.miss == 0.05:  # 0.96
            assert not one.sizes
        else:  # 0.6, then 0.7, then 0.9 at four fifths; chance may take some to the whole
            assert 2 <= len(one.sizes) <= 3
            assert one.truth > 0.85


@pytest.mark.parametrize("seed", range(5))
def test_the_last_ones_end_earlier(seed):
    """What growing is for: a batch lasts as long as its slowest request."""
    misses = [0.05] * 12 + [0.5] * 4
    with_room, without = run(misses, seed, ROOMY), run(misses, seed, 0)
    assert not any(one.sizes for one in without[0])
    assert len(with_room[1]) < 0.75 * len(without[1])


@pytest.mark.parametrize("seed", range(5))
def test_some_grow_in_a_small_pool(seed):
    """`run` checks that the pool holds them; catches that nobody grows where not all can."""
    requests, _ = run([0.5] * 10, seed, slots=10 * 760 + 2 * 1300, output=300)
    assert any(one.sizes for one in requests)


def test_short_outputs_are_left_alone():
    requests, _ = run([0.5] * 10, 1, slots=ROOMY, output=60)
    assert not any(one.sizes for one in requests)


def test_evidence_after_growth():
    """Catches an agreement that still tells of the smaller view 48 tokens later, and one that
    forgets what the text is like."""
    agreement = Agreement()
    for _ in range(40):
        agreement.add(7, 1)
    low = agreement.value
    agreement.view_grew()
    assert agreement.judged_at_size == 0
    assert low < agreement.value < LOW_AGREEMENT - 0.1
    while agreement.judged_at_size < JUDGED_TOKENS:
        agreement.add(7, 7)
    assert agreement.value > LOW_AGREEMENT
