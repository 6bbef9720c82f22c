"""Costs learnt from timed steps."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from sglang_vericache.rounds.costs import Costs, RoundCosts, plain_features, round_features
from sglang_vericache.rounds.linear_cost import MOST_KINDS, LinearCost, Work, non_negative

COEFFICIENTS = (3e-3, 0.9e-3, 3e-6, 0.9e-9, 1.2e-6, 9e-9, 1e-3)


def true_seconds(work: Work) -> float:
    return sum(c * f for c, f in zip(COEFFICIENTS, round_features(work), strict=True))


def observed(count: int, seed: int = 0, noise: float = 0.05) -> LinearCost:
    rng, cost = random.Random(seed), LinearCost(round_features)
    for _ in range(count):
        requests = rng.randint(1, 256)
        work = Work(rng.choice((4, 8, 16)), requests, requests * rng.randint(500, 9000))
        cost.observe(work, true_seconds(work) * (1 + noise * rng.uniform(-1, 1)))
    return cost


def test_a_batch_never_seen_is_predicted():
    cost = observed(200)
    for requests, context in ((3, 4000), (50, 200_000), (200, 1_500_000)):
        for horizon in (4, 8, 16):
            work = Work(horizon, requests, context)
            assert cost.seconds(work) == pytest.approx(true_seconds(work), rel=0.12)


def test_no_coefficient_is_negative():
    """Catches a batch that would take less time the larger it is."""
    for seed in range(20):
        assert min(observed(30, seed, noise=0.4).coefficients) >= 0


def test_least_squares_without_negatives():
    """Against what every choice of free variables gives."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows, target = rng.normal(size=(12, 4)), rng.normal(size=12)
        gram, moved = rows.T @ rows + 1e-6 * np.eye(4), rows.T @ target
        best = 0.0
        for mask in range(1, 16):
            free = [i for i in range(4) if mask >> i & 1]
            part = np.linalg.solve(gram[np.ix_(free, free)], moved[free])
            if part.min() >= 0:
                best = min(best, float(-part @ moved[free] / 2))
        x = non_negative(gram, moved)
        assert x.min() >= 0
        assert x @ gram @ x / 2 - moved @ x == pytest.approx(best, abs=1e-9)


def test_a_pause_changes_nothing():
    cost, work = LinearCost(round_features), Work(8, 32, 32000)
    for n in range(30):
        cost.observe(work, 2.0 if n in (3, 17) else 0.02)
    assert cost.seconds(work) == pytest.approx(0.02, rel=0.02)


def test_costs_that_change_are_followed():
    """Catches a neighbour, or heat, that is not noticed at the batch that runs."""
    cost, work = observed(300), Work(8, 64, 64 * 1000)
    for _ in range(12):
        cost.observe(work, 1.6 * true_seconds(work))
    assert cost.seconds(work) > 1.2 * true_seconds(work)
    for _ in range(200):
        cost.observe(work, 1.6 * true_seconds(work))
    assert cost.seconds(work) == pytest.approx(1.6 * true_seconds(work), rel=0.06)


def test_what_was_not_seen_is_expected_to_be_cheap():
    """Catches a larger batch that is never tried because one request took as long."""
    cost = LinearCost(plain_features)
    for _ in range(5):
        cost.observe(Work(8, 1, 1000), 0.008)
    assert cost.seconds(Work(8, 128, 128_000)) < 0.008 * 30


def test_nothing_is_known_at_first():
    cost = LinearCost(plain_features)
    work = Work(1, 4, 4000)
    assert cost.seconds(work) is None and not cost.knows(work, 4)
    cost.observe(work, 0.0)
    cost.observe(Work(1, 0, 0), 1.0)
    assert cost.seconds(work) is None


def test_what_is_near():
    cost = LinearCost(plain_features)
    cost.observe(Work(1, 16, 16000), 0.01)
    assert cost.knows(Work(8, 5, 16000), 4) and cost.knows(Work(1, 60, 60000), 4)
    assert not cost.knows(Work(1, 3, 16000), 4) and not cost.knows(Work(1, 16, 70000), 4)
    assert cost.knows(Work(1, 1, 100), 4, or_larger=True)
    assert not cost.knows(Work(1, 70, 16000), 4, or_larger=True)


def test_memory_and_time_are_bounded():
    cost = observed(6000)
    assert len(cost._slots) <= MOST_KINDS
    began = time.perf_counter()
    for _ in range(50):
        cost._fit()
    assert (time.perf_counter() - began) / 50 < 0.02  # some 0.2 ms on an idle core


def test_the_lone_token_pays_for_the_scheduler():
    """Catches plain decoding judged by steps of one token."""
    costs = Costs()
    for tokens in (1, 1, 8, 8, 8, 4, 4):
        costs.plain.observe(Work(tokens, 32, 32000), 0.003 + tokens * 0.001)
    assert costs.token_seconds(32, 32000) == pytest.approx(0.001, rel=0.1)
    assert costs.plain.seconds(Work(1, 32, 32000)) == pytest.approx(0.004, rel=0.1)
    assert costs.token_seconds(0, 0) == 0


def test_builds():
    """Catches the first build, which compiles kernels, taken for what builds cost."""
    costs = Costs()
    assert costs.build_seconds(1000) == pytest.approx(1000 * Costs.FIRST_BUILD_SECONDS)
    costs.observe_build(60.0, 2000)
    assert costs.build_seconds(1000) == pytest.approx(1000 * Costs.FIRST_BUILD_SECONDS)
    costs.observe_build(1e-4, 2000)
    assert costs.build_seconds(1000) == pytest.approx(5e-5)
    for _ in range(4):
        costs.observe_build(0.04, 4000)
    assert costs.build_seconds(1000) == pytest.approx(0.01)
    costs.observe_build(1.0, 0)  # every view shared
    assert costs.build_seconds(1000) == pytest.approx(0.01)


def test_few_requests_say_nothing_of_many():
    """Catches what did happen on a GPU: the end of a set, where the last requests take twice what
    the line through all says, made drafting seem twice as dear for the whole of the next set."""
    cost, whole = LinearCost(round_features), Work(8, 128, 128 * 7700)
    for _ in range(20):
        cost.observe(whole, true_seconds(whole))
    for requests in (100, 64, 32, 16):
        work = Work(8, requests, requests * 7700)
        cost.observe(work, true_seconds(work))
    for requests in (4, 3, 2, 1) * 4:
        work = Work(8, requests, requests * 7700)
        cost.observe(work, 2.2 * true_seconds(work))
    assert cost.seconds(whole) == pytest.approx(true_seconds(whole), rel=0.05)
    end = Work(8, 2, 2 * 7700)
    assert cost.seconds(end) == pytest.approx(2.2 * true_seconds(end), rel=0.1)


def test_a_line_that_does_not_fit_is_corrected_nearby():
    """Catches a batch that goes on being misjudged although it has been timed."""
    cost, bend = observed(100), Work(8, 40, 40 * 1000)
    for _ in range(3):
        cost.observe(bend, 1.5 * true_seconds(bend))
    assert cost.seconds(bend) > 1.3 * true_seconds(bend)
    assert cost.correction(Work(8, 2, 2000)) == pytest.approx(1, abs=0.1)


def split_seconds(work: Work) -> tuple[float, float]:
    """Of a draft step, and of a verification."""
    _, h, hb, hk, verify, context, _ = COEFFICIENTS
    b, k = work.requests, work.context
    return h + hb * b + hk * k, 2e-3 + verify * b * (work.length + 1) + context * k


def rest_seconds(work: Work) -> float:
    return 1e-3 + COEFFICIENTS[-1] * (work.steps - 1)


def timed(works, seed: int = 0, noise: float = 0.02, heard: bool = True) -> RoundCosts:
    rng, rounds = random.Random(seed), RoundCosts()

    def noisy(seconds: float) -> float:
        return seconds * (1 + noise * rng.uniform(-1, 1))

    for work in works:
        step, verify = split_seconds(work)
        if heard:
            rounds.drafts.observe(Work(1, work.requests, work.context), noisy(step))
            rounds.verifies.observe(work, noisy(verify))
        rounds.observe(work, noisy(work.length * step + verify + rest_seconds(work)))
    return rounds


@pytest.mark.parametrize("context", [1000, 30000])
def test_horizons_that_do_not_run_are_told_from_their_parts(context):
    """Catches what did happen on a GPU: of rounds of one horizon over a batch that grows nothing
    is known but their sum, and what drafting takes was put down to the context."""
    works = [Work(16, n, n * (context + 16 * i)) for i, n in enumerate((12,) * 60)]
    trials = [Work(h, 4, 4 * context) for h in (16, 8, 4) for _ in range(2)]
    rounds = timed(trials + works)
    batch = works[-1]
    for horizon in (4, 8, 16):
        asked = Work(horizon, batch.requests, batch.context)
        step, verify = split_seconds(asked)
        true = horizon * step + verify + rest_seconds(asked)
        assert rounds.seconds(asked) == pytest.approx(true, rel=0.04)


def test_the_rest_of_a_round():
    """Catches steps that cost nothing, a rest that noise makes, and one that a pause makes."""
    works = [Work(8, 32, 32000, steps) for steps in (1, 2, 3)] * 40
    rounds = timed(works)
    for work in works[:3]:
        assert rounds.rest.seconds(work) == pytest.approx(rest_seconds(work), abs=2e-4)
    before = rounds.rest.seconds(works[0])
    rounds.rest.observe(works[0], 9.0, 0.015)
    assert rounds.rest.seconds(works[0]) == pytest.approx(before, rel=0.05)
    for _ in range(200):
        rounds.rest.observe(works[0], 0.015, 0.016)  # the parts are overestimated
    assert 0 <= rounds.rest.seconds(works[0]) < 2e-4


def test_rounds_of_which_nothing_else_is_heard():
    """Catches a prediction of a part as that of a round."""
    works = [Work(h, n, n * 1000) for h in (4, 8, 16) for n in (2, 8, 32)] * 5
    rounds, asked = timed(works, heard=False), Work(8, 16, 16000)
    assert rounds.seconds(asked) == rounds.whole.seconds(asked)
    rounds.drafts.observe(Work(1, 16, 16000), 1e-3)
    assert rounds.seconds(asked) == rounds.whole.seconds(asked)
    assert RoundCosts().seconds(asked) is None


def test_phases_that_compile_do_not_count():
    """Catches a width that is never tried again: most of what a trial hears of was compiled."""
    rounds, work = timed([Work(16, 32, 32000)] * 20), Work(8, 32, 32000)
    for seconds in (1.0, 1.0, 0.004):
        rounds.verifies.observe(work, seconds)
    assert rounds.verifies.seconds(work) == pytest.approx(0.004, rel=0.1)
