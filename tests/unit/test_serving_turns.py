"""Who measures when, of several servers that are up at once."""

from __future__ import annotations

import threading
import time

import pytest

from benchmarks.serving.turns import Turns


def through(turns: Turns, name: str, cases: int, log: list, delay: float = 0.0) -> threading.Thread:
    def run() -> None:
        time.sleep(delay)
        try:
            for n in range(cases):
                with turns.turn(name):
                    log.append((name, n, "begins"))
                    time.sleep(0.002)
                    log.append((name, n, "ends"))
        finally:
            turns.leave(name)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("delays", [(0, 0, 0), (0.05, 0, 0.02), (0, 0.05, 0)])
def test_one_at_a_time_in_their_order(delays):
    """Catches two that measure at once, one that begins before all servers are up, and one that
    measures all its cases first."""
    names, log = ("plain", "ours", "ours1"), []
    turns = Turns(names)
    threads = [through(turns, n, 3, log, d) for n, d in zip(names, delays, strict=True)]
    for thread in threads:
        thread.join(10)
    wanted = [(name, n) for n in range(3) for name in names]
    assert log == [(*who, what) for who in wanted for what in ("begins", "ends")]


@pytest.mark.parametrize("cases", [0, 1])
def test_who_has_left_is_not_waited_for(cases):
    """A server that does not start, and one that ends in the middle."""
    log: list = []
    turns = Turns(("plain", "ours"))
    threads = [through(turns, "plain", cases, log), through(turns, "ours", 3, log)]
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert [n for name, n, what in log if name == "ours" and what == "ends"] == [0, 1, 2]
