"""Timing of steps for the controller."""

from __future__ import annotations

import pytest

from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.rounds.controller import PLAIN, HorizonController, Load
from sglang_vericache.rounds.pace import Pace, create_pace, horizons_up_to

CONTEXTS = [1000] * 4
LOAD = Load.of(CONTEXTS)


class Recorder(HorizonController):
    def __init__(self) -> None:
        super().__init__((PLAIN, 8))
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
    return Pace(8, recorder, lambda: next(times))


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
