"""Seconds by phase, on the host and by events of a pretended device."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache import phase_clock
from sglang_vericache.phase_clock import PHASES, PhaseClock


def test_host_time(monkeypatch):
    """Catches phases that get each other's time, and time between phases."""
    now = iter([10.0, 12.5, 100.0, 101.0, 200.0, 200.25])
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: next(now))
    clock = PhaseClock("cpu")
    for phase in ("draft", "verify", "draft"):
        with clock(phase):
            pass
    assert clock.seconds == dict.fromkeys(PHASES, 0.0) | {"draft": 2.75, "verify": 1.0}


def test_failed_phase_is_counted(monkeypatch):
    """Catches time that is lost when a phase raises."""
    now = iter([1.0, 3.0])
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: next(now))
    clock = PhaseClock("cpu")
    with pytest.raises(RuntimeError), clock("build"):
        raise RuntimeError
    assert clock.seconds["build"] == 2.0


class Event:
    """A CUDA event whose stream is advanced by hand."""

    made = 0
    passed = 0.0  # of the stream, in ms
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        Event.clock += 10.0
        self.at = Event.clock

    def query(self) -> bool:
        return self.at <= Event.passed

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "this would wait for the device"
        return end.at - self.at


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.made, Event.passed, Event.clock = 0, 0.0, 0.0
    return Event


def test_device_time_is_read_when_it_has_passed(device):
    """Catches a read that waits for the device, and one that never comes."""
    clock = PhaseClock("cuda")
    for phase in ("draft", "verify"):
        with clock(phase):
            pass
    assert sum(clock.seconds.values()) == 0.0
    device.passed = 20.0  # the draft's end
    clock.collect()
    assert (clock.seconds["draft"], clock.seconds["verify"]) == (0.01, 0.0)
    device.passed = 1000.0
    with clock("plain"):
        pass
    assert clock.seconds["verify"] == 0.01
    assert device.made == 4, "the draft's events were not used again"


def test_a_device_that_lags_behind(device):
    """Catches events that pile up without end."""
    clock = PhaseClock("cuda")
    for _ in range(10_000):
        with clock("draft"):
            pass
    assert device.made <= 2 * phase_clock._MOST_PENDING


def test_without_events(device):
    """Catches a GPU server without --enable-metrics that pays for them."""
    clock = PhaseClock("cuda", events=False)
    with clock("draft"):
        pass
    assert device.made == 0 and not any(clock.seconds.values())


def test_one_piece_of_work(device):
    """Catches opened views whose cost nobody hears of: phases around them, or none."""
    told: list[float] = []
    clock = PhaseClock("cuda", events=False)
    with clock.measured(told.append), clock("build"):
        pass
    assert not told
    device.passed = 1000.0
    clock.collect()
    assert told == [0.01]

    host = PhaseClock("cpu")
    with host.measured(told.append), host("build"):
        pass
    assert len(told) == 2 and 0 <= host.seconds["build"] <= told[1]


@pytest.mark.parametrize("events", [True, False])
def test_a_phase_that_somebody_is_told(device, events):
    """Catches four events where two do, seconds that only one of both hears, and phases of a
    server without --enable-metrics that are counted now and then."""
    told: list[float] = []
    clock = PhaseClock("cuda", events)
    for listener in (told.append, None):
        with clock("draft", listener):
            pass
    assert device.made == (4 if events else 2)
    device.passed = 1000.0
    clock.collect()
    assert told == [0.01] and clock.seconds["draft"] == (0.02 if events else 0.0)


def test_a_phase_that_somebody_is_told_on_the_host():
    told: list[float] = []
    clock = PhaseClock("cpu", events=False)
    with clock("draft", told.append):
        pass
    assert told == [clock.seconds["draft"]]
