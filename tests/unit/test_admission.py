"""When waiting requests are let in, on a clock of their own."""

from __future__ import annotations

import random

import pytest

from sglang_vericache.rounds.admission import FEW_TOKENS, MOST_WAIT_S, Admission


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def serve(
    requests: int,
    places: int,
    prefill_s: float,
    round_s: float,
    rounds: tuple[int, int],
    holds: bool = True,
) -> tuple[float, int, Admission]:
    """Seconds and prefills until so many requests are done, each after a random number of rounds;
    a step is a round of all that run."""
    rng, clock = random.Random(5), Clock()
    admission = Admission(clock)
    running: list[int] = []
    waiting, prefills, start = requests, 0, clock.now
    while running or waiting:
        fitting = places - len(running)
        if waiting and fitting and not (holds and admission.holds(fitting, waiting)):
            new = min(fitting, waiting)
            admission.prefill(new)
            clock.now += prefill_s
            waiting, prefills = waiting - new, prefills + 1
            running += [rng.randint(*rounds) for _ in range(new)]
        admission.step(len(running))
        clock.now += round_s
        running = [left - 1 for left in running]
        for _ in range(running.count(0)):
            admission.ended()
        running = [left for left in running if left]
    return clock.now - start, prefills, admission


def test_a_queue_of_short_rounds():
    """SmolLM2 from an eighth of its memory, on an H200: 25 ms a prefill, 8 ms a round. Catches a
    prefill for each of 256 requests."""
    seconds, prefills, admission = serve(256, 28, 0.025, 0.008, (40, 80))
    alone_s, alone, _ = serve(256, 28, 0.025, 0.008, (40, 80), holds=False)
    assert alone > 130 and prefills < 60 and admission.held > prefills
    assert seconds < 0.75 * alone_s


def test_long_rounds_wait_for_nobody():
    """Catches places that stay empty where they are worth more than a prefill."""
    seconds, prefills, _ = serve(48, 12, 0.03, 0.09, (20, 60))
    alone_s, alone, _ = serve(48, 12, 0.03, 0.09, (20, 60), holds=False)
    assert seconds <= 1.03 * alone_s and prefills > 0.7 * alone


def test_equal_requests_come_in_waves():
    seconds, prefills, admission = serve(120, 30, 0.025, 0.008, (60, 60))
    assert prefills == 4 and admission.held == 0
    assert seconds == serve(120, 30, 0.025, 0.008, (60, 60), holds=False)[0]


@pytest.fixture
def busy():
    """Sixteen run, one ends every 20 ms, and a prefill costs 25."""
    clock = Clock()
    admission = Admission(clock)
    admission.prefill(1)
    clock.now += 0.025
    admission.step(16)
    for _ in range(32):
        clock.now += 0.02
        admission.ended()
        admission.step(16)
    assert admission.together == 5
    return clock, admission


def test_who_waits(busy):
    """Catches a request that waits for others that do not come, for memory that is there, or for
    ever."""
    clock, admission = busy
    assert admission.holds(fitting=1, waiting=9)
    assert not admission.holds(fitting=1, waiting=1), "nobody else waits"
    assert not admission.holds(fitting=5, waiting=9)
    assert not admission.holds(fitting=0, waiting=9), "memory decides"
    assert admission.holds(fitting=4, waiting=9)
    clock.now += MOST_WAIT_S / 2
    assert admission.holds(fitting=4, waiting=9)
    clock.now += MOST_WAIT_S / 2
    assert not admission.holds(fitting=1, waiting=9)
    assert admission.held == 3
    admission.step(2)
    admission.ended()
    admission.ended()
    assert not admission.holds(fitting=1, waiting=9), "nobody runs, and no step tells"


def test_what_is_not_known():
    """Catches the computing of a long prompt that is taken for what every prefill costs."""
    clock = Clock()
    admission = Admission(clock)
    for _ in range(8):
        admission.prefill(FEW_TOKENS + 1)
        clock.now += 0.4
        admission.step(12)
        clock.now += 0.02
        admission.ended()
    for _ in range(40):
        clock.now += 0.02
        admission.ended()
    admission.step(12)
    assert admission.together == 1 and not admission.holds(1, 9)
    assert admission.prefill_s == 0.0
    admission.prefill(1)
    clock.now += 0.02
    admission.step(12)
    assert admission.together > 1 and admission.prefill_s == pytest.approx(0.02)


def test_loading_is_not_saved():
    """Catches four gigabytes that come from the host with each prompt, taken for what one prefill
    of several would save."""
    clock = Clock()
    together = []
    for loading_s in (0.0, 0.09, 0.3):
        admission = Admission(clock)
        admission.prefill(1, loading_s)
        clock.now += 0.1
        admission.step(12)
        for _ in range(8):
            clock.now += 0.1
            admission.ended()
            admission.step(12)
        together.append(admission.together)
    assert together == [4, 1, 1]


@pytest.mark.parametrize("requests", [1, 28])
def test_a_host_that_runs_ahead_waits_for_no_loading(requests):
    """Catches a prefill that seems to cost nothing because its 28 prompts come from the host at the
    device's leisure: by the shortest one each end let one request in, for 256 prefills of 25 ms."""
    clock = Clock()
    admission = Admission(clock)
    admission.prefill(requests, 0.004 * requests)
    clock.now += 0.025
    admission.launched()
    clock.now += 0.001
    admission.step(28)
    for _ in range(8):
        clock.now += 0.05
        admission.ended()
        admission.step(28)
    assert admission.together == 5


def late(admission: Admission, clock: Clock, step_s: float, prefill_s: float, ends: int) -> None:
    """Steps as a host that runs ahead sees them: a prefill is launched in no time, and the step
    behind it begins at once and lasts longer."""
    for n in range(ends):
        admission.prefill(1)
        clock.now += 0.002
        admission.launched()
        admission.step(28)
        clock.now += prefill_s
        for _ in range(3 if n % 2 else 1):
            clock.now += step_s
            admission.step(28)
        admission.ended()


def test_a_prefill_that_the_device_is_late_with():
    """Catches one that seems to cost nothing since the host launches a single graph: each end let
    one request in, and a step was three times as long."""
    clock = Clock()
    admission = Admission(clock)
    late(admission, clock, 0.006, 0.018, 16)
    assert admission.prefill_s == pytest.approx(0.02) and admission.together >= 5


def test_steps_that_are_all_behind_prefills():
    """Without a usual step nothing is told but what the host takes; with one, what follows at once
    is the next prefill."""
    clock = Clock()
    admission = Admission(clock)
    for known in (False, True):
        if known:
            for _ in range(3):
                admission.step(28)
                clock.now += 0.006
        for _ in range(12):
            admission.prefill(1)
            clock.now += 0.002
            admission.launched()
            admission.step(28)
            clock.now += 0.006 + 0.018
        admission.prefill(1)
        assert admission.prefill_s == pytest.approx(0.02 if known else 0.002)
        clock.now += 0.02
        admission.step(28)


def test_a_pause_is_nobodys_time():
    """Catches minutes without a request taken for what a prefill costs, or for a step."""
    clock = Clock()
    admission = Admission(clock)
    late(admission, clock, 0.006, 0.018, 12)
    for n in range(12):
        admission.prefill(1)
        clock.now += 0.02
        admission.step(1)
        if n % 2:
            admission.ended()
        else:  # it had ended before it had a state: the step behind it is for nobody
            admission.step(0)
        clock.now += 60
    late(admission, clock, 0.006, 0.018, 12)
    assert admission.prefill_s == pytest.approx(0.02)


def test_the_shortest_prefill_counts(busy):
    clock, admission = busy
    for seconds in (0.3, 0.2, 0.4):
        admission.prefill(100)
        clock.now += seconds
        admission.step(16)
    assert admission.together < 5, "ends were rarer meanwhile"
    assert admission.together > 1
