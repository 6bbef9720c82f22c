"""Timing of steps for the controller."""

from __future__ import annotations

import pytest

from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.rounds.controller import PLAIN, HorizonController, Load
from sglang_vericache.rounds.pace import (
    MOST_PARTS,
    MOST_PLAIN_STEPS,
    Choice,
    Pace,
    create_pace,
    horizons_up_to,
)

CONTEXTS = [1000] * 4
LOAD = Load.of(CONTEXTS)


class Recorder(HorizonController):
    def __init__(self, horizons=(PLAIN, 8)) -> None:
        super().__init__(horizons)
        self.observed: list[tuple[float, int]] = []

    def observe(self, load, horizon, seconds, tokens) -> None:
        assert load == LOAD
        self.observed.append((seconds, tokens))
        super().observe(load, horizon, seconds, tokens)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def pace(recorder) -> Pace:
    times = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    return Pace(8, recorder, clock=lambda: next(times))


def test_yields_after_the_next_step(pace, recorder):
    """Overlap scheduling: catches tokens counted for the step that runs when they arrive."""
    pace.begin(CONTEXTS)
    pace.begin(CONTEXTS)
    pace.settle(10)
    pace.begin(CONTEXTS)
    pace.settle(20)
    assert recorder.observed == [(1.0, 10), (2.0, 20)]


def test_yields_before_the_next_step(pace, recorder):
    pace.begin(CONTEXTS)
    pace.settle(10)
    assert recorder.observed == []
    pace.begin(CONTEXTS)
    pace.settle(20)
    pace.begin(CONTEXTS)
    assert recorder.observed == [(1.0, 10), (2.0, 20)]


def test_steps_before_a_prefill_or_with_builds_do_not_count(pace, recorder):
    """Catches a prefill's time taken for a slow horizon."""
    pace.begin(CONTEXTS)
    pace.interrupt()
    pace.settle(10)
    pace.begin(CONTEXTS)
    pace.unusual()
    pace.settle(20)
    pace.begin(CONTEXTS)
    pace.settle(30)
    pace.begin(CONTEXTS)
    assert recorder.observed == [(4.0, 30)]


@pytest.mark.parametrize(
    ("policy", "on_gpu", "adapts"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("fixed", True, False),
        ("adaptive", False, True),
    ],
)
def test_policies(policy, on_gpu, adapts):
    pace = create_pace(VeriCacheConfig(horizon_policy=policy), on_gpu)
    assert (pace.controller is not None) == adapts
    assert pace.begin(CONTEXTS).horizon == 16


@pytest.mark.parametrize(
    ("longest", "horizons"), [(16, (0, 4, 8, 16)), (1, (0, 1)), (3, (0, 1, 3))]
)
def test_horizons(longest, horizons):
    assert horizons_up_to(longest) == horizons


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(pace: Pace, clock: Clock, seconds: float, tokens: int, **done) -> Choice:
    choice = pace.begin(CONTEXTS)
    pace.planned(**done)
    clock.now += seconds
    pace.settle(tokens)
    return choice


def test_a_long_round_takes_several_steps():
    """Catches steps that hold up arrivals, a round whose steps are judged one by one (those that
    only draft yield nothing), and a horizon that changes in the middle of a round."""
    recorder, clock = Recorder(horizons=(8,)), Clock()
    pace = Pace(8, recorder, longest_step=0.03, clock=clock)
    whole = dict(plain_steps=0, ends_round=True)
    assert run(pace, clock, 0.08, 20, **whole).share == 8
    pace.begin(CONTEXTS)
    pace.settle(0)
    assert recorder.observed[0] == (pytest.approx(0.08), 20)
    recorder.observed.clear()
    part = dict(plain_steps=0, ends_round=False)
    clock.now += 0.08
    choices = [run(pace, clock, 0.03, 0, **part), run(pace, clock, 0.03, 0, **part)]
    choices.append(run(pace, clock, 0.04, 20, **whole))
    assert [(c.horizon, c.share) for c in choices] == [(8, 3)] * 3
    pace.begin(CONTEXTS)
    assert recorder.observed[-1] == (pytest.approx(0.1), 20)


def test_plain_steps_fit_into_a_step():
    """Catches several plain steps before one was timed, more than fit, and one horizon charged
    with what another did."""
    recorder, clock = Recorder(horizons=(PLAIN, 8)), Clock()
    pace = Pace(8, recorder, longest_step=0.03, clock=clock)
    plain = dict(plain_steps=1, ends_round=True)
    assert [run(pace, clock, 0.005, 4, **plain).plain_steps for _ in range(3)] == [1, 1, 3]
    many = dict(plain_steps=3, ends_round=True)
    assert run(pace, clock, 0.003, 12, **many).plain_steps == 3
    for _ in range(30):
        choice = run(pace, clock, 0.003, 12, **many)
    assert choice.plain_steps == MOST_PLAIN_STEPS
    rates = recorder.rates()[LOAD]
    assert rates[8] is None and rates[PLAIN] > 800


def test_steps_are_whole_without_a_controller():
    """Catches rounds of the fixed policy that are split."""
    pace = Pace(8, None, longest_step=0.001)
    choice = pace.begin(CONTEXTS)
    pace.planned(1, True)
    assert (choice.horizon, choice.share, choice.plain_steps) == (8, 8, 1)


def test_one_slow_round_does_not_split_the_next():
    """Catches a compiled kernel that is taken for the length of a round, and rounds in shreds."""
    recorder, clock = Recorder(horizons=(8,)), Clock()
    pace = Pace(8, recorder, longest_step=0.03, clock=clock)
    whole = dict(plain_steps=0, ends_round=True)
    for seconds in (0.02, 0.02, 9.0, 0.02, 0.02):
        choice = run(pace, clock, seconds, 20, **whole)
    assert choice.share == 8
    for _ in range(5):
        choice = run(pace, clock, 9.0, 20, **whole)
    assert choice.share == 8 // MOST_PARTS


def test_parts_do_not_ask_for_more_parts():
    """Catches a batch whose rounds the host paces: in parts they take longer, which must not split
    them further."""
    recorder, clock = Recorder(horizons=(8,)), Clock()
    pace = Pace(8, recorder, longest_step=0.03, clock=clock)
    whole = dict(plain_steps=0, ends_round=True)
    for _ in range(3):
        run(pace, clock, 0.04, 20, **whole)
    for _ in range(20):
        assert run(pace, clock, 0.04, 0, plain_steps=0, ends_round=False).share == 4
        assert run(pace, clock, 0.04, 20, **whole).share == 4


def test_plain_decoding_is_judged_by_steps_of_several_tokens():
    """Catches the first steps, of one token each, told as the speed of plain decoding: the
    scheduler's own work is then all of it, and drafting wins where it should not."""
    clock, recorder = Clock(), Recorder((PLAIN,))
    pace = Pace(8, recorder, 0.030, clock)
    scheduler_s, token_s = 0.003, 0.001
    for _ in range(8):
        steps = pace.begin(CONTEXTS).plain_steps
        pace.planned(steps, True)
        clock.now += scheduler_s + steps * token_s
        pace.settle(steps * len(CONTEXTS))
    pace.begin(CONTEXTS)
    tokens = [tokens // len(CONTEXTS) for _, tokens in recorder.observed]
    assert len(tokens) >= 5 and min(tokens) >= 3
