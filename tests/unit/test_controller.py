"""The horizon controller, told made-up durations."""

from __future__ import annotations

import random
from collections import Counter, deque

import numpy as np
import pytest

from sglang_vericache.rounds.batch import Batch
from sglang_vericache.rounds.controller import (
    CLOSING_STEPS,
    FIRST_CHECK,
    LONGEST_CHECK,
    PLAIN,
    TRIAL_ROUNDS,
    HorizonController,
)
from sglang_vericache.rounds.linear_cost import Work

HORIZONS = (PLAIN, 4, 8, 16)
COUNT = 256


def batch_of(count=COUNT, context=7700, agreement=0.8, views=True, left=100_000, **more) -> Batch:
    return Batch(
        [context] * count,
        [left] * count,
        range(count),
        np.full(count, agreement),
        np.array([agreement]),
        0 if views else count,
        **more,
    )


BATCH = batch_of()


def drive(
    controller, rates, steps, batch=BATCH, late=1, noise=0.0, seed=0, outcome=None
) -> list[int]:
    """Choices over ``steps`` rounds at so many tokens a second by horizon; what a round took is
    told ``late`` rounds later."""
    rng, chosen, pending = random.Random(seed), [], deque()
    for step in range(steps):
        horizon = controller.choose(batch)
        chosen.append(horizon)
        now = rates(step) if callable(rates) else rates
        noisy = now[horizon] * (1 + noise * rng.uniform(-1, 1))
        pending.append((horizon, noisy))
        if len(pending) > late and (outcome is None or outcome(step)):
            tell(controller, batch, *pending.popleft())
    return chosen


def tell(controller, batch, horizon, rate) -> None:
    if horizon == PLAIN:
        steps = controller.plain_steps(batch)
        work = Work(steps, batch.requests, batch.context)
        controller.observe_plain(work, steps * batch.requests / rate)
    else:
        work = Work(horizon, batch.requests, batch.context)
        controller.observe_round(work, batch.tokens(horizon) / rate)


def seen_all(rates, batch=BATCH, **more) -> HorizonController:
    """A controller that has tried everything once."""
    controller = HorizonController(HORIZONS, **more)
    drive(controller, rates, 60, batch)
    return controller


@pytest.mark.parametrize("cold", [1, 4, 6])
def test_what_was_slow_at_first_is_tried_again(cold):
    """Catches a horizon that stays out because its first rounds compiled something."""
    rates = {PLAIN: 10_000, 4: 30_000, 8: 36_000, 16: 33_000}
    drafted = Counter()

    class Device(HorizonController):
        def observe_round(self, work, seconds):
            drafted[work.length] += 1
            slow = work.length == 8 and drafted[8] <= cold
            super().observe_round(work, seconds * (1.4 if slow else 1))

    controller = Device(HORIZONS)
    drive(controller, rates, 6000)
    assert controller.current == 8
    assert drafted[8] > 3000


def test_what_stays_slow_is_seldom_tried():
    """Catches trials that cost what they cannot bring."""
    controller = seen_all({PLAIN: 10_000, 4: 30_000, 8: 31_500, 16: 33_000})
    chosen = Counter(drive(controller, {PLAIN: 10_000, 4: 30_000, 8: 31_500, 16: 33_000}, 20_000))
    assert controller.current == 16
    assert 0 < chosen[8] + chosen[4] < 0.01 * 20_000


def test_what_is_hopeless_is_not_tried_again():
    rates = {PLAIN: 10_000, 4: 12_000, 8: 20_000, 16: 33_000}
    controller = seen_all(rates)
    assert set(drive(controller, rates, 2000)) == {16}


@pytest.mark.parametrize("best", HORIZONS)
@pytest.mark.parametrize("late", [0, 1, 3])
def test_the_fastest_is_found_and_kept(best, late):
    """Catches a horizon that is never tried, and results attributed to another one."""
    # Durations have to be of the model's form.
    seconds = {h: 0.010 + 0.002 * h for h in HORIZONS[1:]}
    rates = {h: BATCH.tokens(h) / s for h, s in seconds.items()}
    if best in (4, 8, 16):
        batch = batch_of(agreement={4: 0.5, 8: 0.75, 16: 0.99}[best])
        seconds = {h: 0.010 + 0.003 * h for h in HORIZONS[1:]}
        rates = {h: batch.tokens(h) / s for h, s in seconds.items()}
        best = max(rates, key=lambda h: rates[h])
        rates[PLAIN] = max(rates.values()) / 2
    else:
        batch, rates[PLAIN] = BATCH, 2 * max(rates.values())
    chosen = drive(HorizonController(HORIZONS), rates, 1500, batch, late=late)
    assert chosen[0] == 16
    assert chosen[60:500] == [best] * 440
    assert Counter(chosen)[best] > 0.95 * 1500


def test_trials_are_once_for_a_server():
    """Catches what the controller before this one did: each size of batch tried everything."""
    rates = {PLAIN: 1000, 4: 2000, 8: 2500, 16: 2000}
    controller = seen_all(rates)
    for count in range(250, 70, -10):
        assert set(drive(controller, rates, 10, batch_of(count))) == {8}


def test_no_oscillation_at_the_threshold():
    """Catches switching back and forth between equals under noise."""
    switches = []
    controller = HorizonController(HORIZONS, on_switch=lambda *change: switches.append(change))
    rates = {PLAIN: 1000, 4: 990, 8: 1010, 16: 1000}
    drive(controller, rates, 10000, noise=0.04)
    assert len(switches) <= 2


def test_agreement_that_wavers_does_not_switch():
    """The same for the other half of a prediction."""
    switches = []
    controller = HorizonController(HORIZONS, on_switch=lambda *change: switches.append(change))
    rates = {PLAIN: 1000, 4: 1000, 8: 1000, 16: 1000}
    rng = random.Random(0)
    drive(controller, rates, 60)
    before = len(switches)
    for _ in range(2000):
        controller.choose(batch_of(agreement=0.8 + 0.004 * rng.uniform(-1, 1)))
    assert len(switches) - before <= 2


def test_a_change_of_the_workload_is_noticed():
    """Texts that no longer agree: without a single trial."""
    rates = {PLAIN: 4000, 4: 7000, 8: 9000, 16: 12000}
    controller = seen_all(rates, batch_of(agreement=0.97))
    assert controller.choose(batch_of(agreement=0.97)) == 16
    assert controller.choose(batch_of(agreement=0.3)) == PLAIN
    assert controller.choose(batch_of(agreement=0.97)) == 16


def test_views_are_opened_for_what_pays_for_them():
    rates = {PLAIN: 1000, 4: 1500, 8: 1500, 16: 1500}
    controller = seen_all(rates | {PLAIN: 9000})
    drive(controller, rates, 500)  # now that plain decoding is slower, they are open
    assert controller.current != PLAIN
    assert controller.choose(batch_of(views=False, left=5)) == PLAIN
    assert controller.choose(batch_of(views=False, left=100_000)) != PLAIN


def test_views_close_only_where_plain_is_clearly_better():
    marginal = {PLAIN: 1080, 4: 1000, 8: 1000, 16: 1000}
    controller = seen_all(marginal)
    assert set(drive(controller, marginal, 100)) == {PLAIN}
    assert not controller.closes_views
    clear = {PLAIN: 2000, 4: 1000, 8: 1000, 16: 1000}
    controller = seen_all(clear)
    drive(controller, clear, CLOSING_STEPS + 5)
    assert controller.closes_views


def test_the_loser_is_checked_ever_more_rarely():
    """Catches exploring that costs a constant share for ever, or that ends for ever."""
    rates = {PLAIN: 1200, 4: 1000, 8: 1000, 16: 1000}
    chosen = drive(HorizonController(HORIZONS), rates, 20 * FIRST_CHECK)
    early = sum(h != PLAIN for h in chosen[100 : 4 * FIRST_CHECK])
    late = sum(h != PLAIN for h in chosen[-8 * FIRST_CHECK :])
    assert 0 < early < 30 and late <= early


def test_the_hopeless_is_not_checked():
    rates = {PLAIN: 5000, 4: 500, 8: 500, 16: 500}
    chosen = drive(HorizonController(HORIZONS), rates, 4 * FIRST_CHECK)
    assert set(chosen[100:]) == {PLAIN}


def test_checks_are_bounded():
    rates = {PLAIN: 1200, 4: 1000, 8: 1000, 16: 1000}
    controller = HorizonController(HORIZONS)
    drive(controller, rates, 30 * FIRST_CHECK)
    assert all(wait <= LONGEST_CHECK for wait in controller._wait.values())


def test_plain_decoding_is_checked_where_it_was_never_seen():
    """Catches a batch that shrank and drafts on because of what plain steps took before."""
    rates = {PLAIN: 1000, 4: 1500, 8: 1500, 16: 1500}
    controller = seen_all(rates)
    few = batch_of(8)
    chosen = drive(controller, {PLAIN: 200, 4: 80, 8: 100, 16: 90}, 60, few)
    assert set(chosen[-40:]) == {PLAIN}


def test_new_texts_are_tried_although_earlier_ones_did_not_agree():
    """Catches drafting that stays closed for ever because of what is only presumed."""
    rates = {PLAIN: 4000, 4: 3000, 8: 2000, 16: 1000}
    controller = seen_all(rates, batch_of(agreement=0.5))
    new = Batch([7700] * 256, [10**6] * 256, range(256), np.zeros(0), np.array([0.5]), 256)
    chosen = [controller.choose(new) for _ in range(FIRST_CHECK + 50)]
    assert 0 < sum(h != PLAIN for h in chosen) <= TRIAL_ROUNDS


def test_steps_that_are_never_observed_stall_nothing():
    """Catches waiting for results of rounds that prefills interrupt; and trials without end."""
    controller = HorizonController(HORIZONS)
    chosen = [controller.choose(BATCH) for _ in range(500)]
    assert set(chosen[:200]) == set(HORIZONS)
    assert sum(h != 16 for h in chosen[-300:]) <= 3 * TRIAL_ROUNDS
    chosen = drive(controller, {PLAIN: 2000, 4: 1000, 8: 1000, 16: 1000}, 300)
    assert chosen[-1] == PLAIN or len(set(chosen)) == 1


@pytest.mark.parametrize("every", [2, 5])
def test_steps_that_are_seldom_observed_suffice(every):
    rates = {PLAIN: 3000, 4: 1000, 8: 1000, 16: 1000}
    chosen = drive(
        HorizonController(HORIZONS), rates, 400, outcome=lambda step: step % every == 0, late=0
    )
    assert Counter(chosen[-200:])[PLAIN] > 190


def test_nobody_can_draft():
    controller = HorizonController(HORIZONS)
    for batch in (
        Batch([], [], [], np.zeros(0), np.zeros(0)),
        Batch([500] * 3, [9] * 3, [], np.zeros(0), np.zeros(0)),
    ):
        for _ in range(50):
            assert controller.choose(batch) == 16
            controller.observe_plain(Work(1, batch.requests, batch.context), 0.01)
        assert controller.rates(batch).get(16) is None


def test_those_that_cannot_draft_do_not_count_as_drafting():
    """Catches a batch of which two draft, predicted as if all did."""
    controller = seen_all({PLAIN: 4000, 4: 7000, 8: 9000, 16: 12000}, batch_of(agreement=0.97))
    few = Batch([7700] * 256, [1000] * 256, [0, 1], np.full(2, 0.97), np.array([0.97]), 0)
    assert few.tokens(16) < 256 + 2 * 17
    assert controller.choose(few) == PLAIN


def test_no_plain_decoding_while_the_full_kv_is_elsewhere():
    rates = {PLAIN: 9000, 4: 1000, 8: 1000, 16: 1000}
    controller = seen_all(rates)
    assert controller.choose(BATCH) == PLAIN
    assert controller.choose(batch_of(rotating=True)) != PLAIN
    assert HorizonController(HORIZONS).choose(batch_of(rotating=True)) == 16


def test_one_horizon_needs_no_trial():
    controller = HorizonController((16,))
    assert set(drive(controller, {16: 1000}, 100)) == {16}


def test_one_request_says_little_of_many():
    """Catches what did happen on a GPU: trials were of the request that came first, alone, and 28
    were expected to take as much longer as a line through one request may rise. They were decoded
    plainly ever after, at half the rate."""
    controller = HorizonController(HORIZONS)
    costs = controller.costs
    for horizon in (4, 8, 16):
        for _ in range(3):
            costs.rounds.drafts.observe(Work(1, 1, 7700), 0.94e-3)
            costs.rounds.verifies.observe(Work(horizon, 1, 7700), 1.3e-3)
            work = Work(horizon, 1, 7700)
            controller.observe_round(work, 0.94e-3 * horizon + 1.3e-3 + 0.7e-3)
    many = Batch([7700] * 28, [256] * 28, range(28), np.array([]), np.array([0.74]), 28)
    for count in (1, 28):
        for _ in range(8):
            controller.observe_plain(Work(8, count, 7700 * count), 8 * (1.7e-3 + 0.05e-3 * count))
    chosen = [controller.choose(many) for _ in range(30)]
    assert any(horizon != PLAIN for horizon in chosen)


def test_first_plain_steps_are_not_too_long():
    """Catches all of a first step being taken for the scheduler's work: eight tokens of 256
    requests in the next one, 140 ms."""
    controller = HorizonController(HORIZONS, longest_step=0.03)
    controller.observe_plain(Work(1, BATCH.requests, BATCH.context), 17e-3)
    assert controller.plain_steps(BATCH) == 1
    controller.observe_plain(Work(1, 1, 7700), 3e-3)
    assert controller.plain_steps(batch_of(1)) > 1


def test_doubt_does_not_end():
    """Catches plain decoding that is tried again and again where it is slow, and only verifying
    lets it seem fast."""
    controller = HorizonController(HORIZONS)
    rates = {PLAIN: 10_000, 4: 20_000, 8: 16_000, 16: 9_000}
    for _ in range(50):
        for horizon in HORIZONS[1:]:
            controller.costs.rounds.verifies.observe(Work(horizon, COUNT, BATCH.context), 5e-3)
    chosen = drive(controller, rates, 20_000)
    checks = [i for i, h in enumerate(chosen) if h == PLAIN and i and chosen[i - 1] != PLAIN]
    assert controller.current == 4 and len(checks) < 20
    apart = np.diff(checks)[-3:]
    assert (apart > 1000).all()
