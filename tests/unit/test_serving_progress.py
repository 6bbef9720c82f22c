"""Where a benchmark's time went."""

from __future__ import annotations

import time

import pytest

from benchmarks.serving.progress import SERVER, Progress, spent_lines


def test_parts_add_up(capsys):
    """Catches time that belongs to no part, and a log of one line for each repetition."""
    began = time.perf_counter()
    with Progress("ours", 2) as progress:
        progress.begin(SERVER, "start")
        time.sleep(0.02)
        for what in ("runs", "runs", "closed loop"):
            progress.begin("one", what)
            time.sleep(0.01)
        progress.case_done()
        progress.begin(SERVER, "stop")
    took = time.perf_counter() - began
    spent = progress.spent
    assert {case: list(parts) for case, parts in spent.items()} == {
        "server": ["start", "stop"],
        "one": ["runs", "closed loop"],
    }
    assert sum(sum(parts.values()) for parts in spent.values()) == pytest.approx(took, abs=0.02)
    assert spent["one"]["runs"] >= 0.02
    out = capsys.readouterr().out  # of a pipe, where a bar would be noise
    assert out.count("ours: one, runs") == 1 and "ours: server, start" in out


def test_lines():
    record = {
        "side": {"name": "ours"},
        "spent_s": {"server": {"start": 90.04}, "one": {"runs": 6.0, "closed loop": 11.26}},
    }
    assert spent_lines(record) == [
        "ours: 107 s",
        "  server 90.0 s: start 90.0",
        "  one 17.3 s: runs 6.0, closed loop 11.3",
    ]
    assert spent_lines({"side": {"name": "ours"}}) == []
