"""``python -m sglang_vericache bench`` from its arguments to its rows, against stand-in servers."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("aiohttp")

from benchmarks import render, rows
from benchmarks.serving import __main__ as command
from benchmarks.serving import client, server, side
from benchmarks.serving.lone_first_tokens import KINDS

STAND_IN = Path(__file__).with_name("bench_stand_in.py")
CASES = ("--case", "mine:80:3", "--case", "one:60:1")
ARGUMENTS = (
    "--model",
    "shape:tiny",
    "--flags",
    "--device cpu",
    "--tokens",
    "320",
    "--repeats",
    "2",
)
LABEL = "run-lengths.json, snapkv+int4had 0.2, greedy"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    class Stand(server.ServingServer):
        started: ClassVar[list] = []

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.command = [sys.executable, str(STAND_IN), self.command[6]]
            Stand.started.append(self)

    monkeypatch.setattr(side, "ServingServer", Stand)
    monkeypatch.setattr(side, "STARTED", tmp_path / "started")
    monkeypatch.setattr(client, "WARM_S", 0.1)
    monkeypatch.setattr(client, "AFTER_S", 0.1)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(render, "render_all", lambda **_: 0)
    monkeypatch.setenv("VERICACHE_COMMIT", "abcdef1")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    yield Stand.started
    for number, handler in before.items():
        signal.signal(number, handler)
    assert not any(stand.alive for stand in Stand.started)


def bench(folder: Path, *more: str) -> int:
    return command.main([*ARGUMENTS, "--out", str(folder / "out"), *more])


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / "out" / name).read_text())


def test_a_comparison_in_two_calls(tmp_path, capsys):
    """Catches a part of it that only fails, or only takes its time, where a device is at stake."""
    began = time.perf_counter()
    cases = (*CASES, "--seconds", "0.7")
    assert bench(tmp_path, *cases, "--order", "plain", "--no-rows") == 0
    assert "nothing to compare" in capsys.readouterr().out
    assert bench(tmp_path, *cases, "--order", "ours", "--no-rows") == 0
    took = time.perf_counter() - began
    told = capsys.readouterr().out
    assert "mine decode_rate: " in told and "SIMULATED ACCEPTANCE" in told
    assert not rows.RESULTS.exists()
    known = [record(tmp_path, name) for name in ("run-00-plain.json", "run-01-ours.json")]
    # Nearly all of the time belongs to a part that is told.
    spent = sum(sum(map(sum, map(dict.values, r["spent_s"].values()))) for r in known)
    assert spent > took - 1.5
    assert "  mine " in told and "closed loop 0." in told
    assert list(known[1]["spent_s"]["mine"]) == [
        *("prompts", "prefill", "first run", "runs", "closed loop", "loop's end", "flush")
    ]
    assert list(known[0]["spent_s"]["one"]) == [
        *("prompts", "prefill", "first run", "runs"),
        *(f"{kind} requests" for kind in KINDS),
        "flush",
    ]
    loop = known[1]["cases"]["mine"]["closed"]
    assert len(loop["rates"]) == 7 and loop["tokens_per_round"] == pytest.approx(4.0, rel=0.05)
    # 4 tokens in 6 ms against one in 2 ms; 4 times as many where cores are busy and events count.
    ratio = sum(loop["rates"]) / sum(known[0]["cases"]["mine"]["closed"]["rates"])
    assert 1.0 < ratio < 6.0
    # What chose the horizons, of ours only.
    assert known[1]["cases"]["mine"]["pace"]["rounds_in_parts"] == 1
    assert "horizons" in known[1]["cases"]["one"]["pace"]
    assert "pace" not in known[0]["cases"]["mine"]
    for _ in range(2):  # a second time there is nothing new
        assert bench(tmp_path, "--order", "") == 0
        found = rows.read("serving.jsonl")
        assert [(row.case, row.metric) for row in found] == [
            *(("mine", "decode_rate"), ("mine", "fixed_set_rate"), ("mine", "closed_loop_rate")),
            ("one", "decode_rate"),
        ]
        assert all(row.simulated_acceptance == LABEL for row in found)
    steady, whole, looped, lone = found
    assert "first tokens of lone requests: uncached " in lone.note
    assert "; cached, at once " in lone.note and "s or at once after another one)" in lone.note
    assert "sent in one request" in steady.note and "rate while all run" in steady.note
    assert re.search(r"all began within \d\d? ms", steady.note)
    assert "from sending to the last token; 2 runs" in whole.note
    assert "7 windows" in looped.note and "2 runs" in lone.note


def end_during_the_second_case(monkeypatch) -> None:
    """The command is told to end while "one" is measured."""
    measure = side.measure

    def interrupted(server, case, prompts, repeats, *more):
        if case.name == "one":
            repeats = 500
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return measure(server, case, prompts, repeats, *more)

    monkeypatch.setattr(side, "measure", interrupted)


def test_servers_that_are_up_at_once(tmp_path, stand_ins):
    """Catches figures of one in the place of the other's, and a note that says otherwise."""
    assert bench(tmp_path, *CASES, "--order", "plain,ours", "--together") == 0
    known = [record(tmp_path, name) for name in ("run-00-plain.json", "run-01-ours.json")]
    assert [list(r["cases"]) for r in known] == [["mine", "one"]] * 2
    assert len(stand_ins) == 2 and all("waiting" in r["spent_s"]["server"] for r in known)
    found = rows.read("serving.jsonl")
    assert {row.case for row in found} == {"mine", "one"}  # no row of how long they took to start
    assert all("servers up at once, each case by turns: plain, ours" in row.note for row in found)


def test_an_interruption_of_both(tmp_path, stand_ins, monkeypatch):
    """Catches a server that outlives the command, and a command that waits for it."""
    end_during_the_second_case(monkeypatch)
    began = time.perf_counter()
    with pytest.raises(SystemExit) as end:
        bench(tmp_path, *CASES, "--order", "plain,ours", "--together", "--no-rows")
    assert end.value.code == 128 + signal.SIGTERM and time.perf_counter() - began < 60
    assert len(stand_ins) == 2 and not any(stand.alive for stand in stand_ins)
    assert "mine" in record(tmp_path, "run-00-plain.json")["cases"]


def test_an_interruption(tmp_path, stand_ins, capsys, monkeypatch):
    """Catches a server that goes on, and figures that cannot be joined afterwards."""
    assert bench(tmp_path, *CASES, "--order", "plain", "--no-rows") == 0
    stand_ins.clear()
    end_during_the_second_case(monkeypatch)
    with pytest.raises(SystemExit) as end:
        bench(tmp_path, *CASES, "--order", "ours", "--no-rows")
    assert end.value.code == 128 + signal.SIGTERM and not stand_ins[0].alive
    assert list(record(tmp_path, "run-01-ours.json")["cases"]) == ["mine"]
    capsys.readouterr()
    assert bench(tmp_path, "--order", "", "--no-rows") == 0
    told = capsys.readouterr().out
    assert "mine decode_rate" in told and "one decode_rate" not in told


def test_a_server_that_dies(tmp_path, monkeypatch, capsys):
    """Catches a failure that ends the other side as well, hangs, or does not name the log."""
    monkeypatch.setenv("STAND_IN_DIES_AT", "60")
    began = time.perf_counter()
    code = bench(tmp_path, *CASES, "--case", "third:50:1", "--order", "plain,ours", "--no-rows")
    assert code == 1 and time.perf_counter() - began < 60
    told = capsys.readouterr().out
    for name in ("plain", "ours"):
        log = tmp_path / "out" / f"run-0{int(name == 'ours')}-{name}.log"
        line = next(line for line in told.splitlines() if f"FAILED {name}: one" in line)
        assert f"MemoryError: no room for a stand-in; see {log}" in line
        assert f"FAILED {name}: third: not measured" in told
    assert "mine decode_rate" in told


def test_without_a_loop(tmp_path):
    """Catches a loop that takes its time although nobody asked for it."""
    assert bench(tmp_path, *CASES[:2]) == 0
    assert "closed" not in record(tmp_path, "run-00-plain.json")["cases"]["mine"]
    assert [row.metric for row in rows.read("serving.jsonl")] == ["decode_rate", "fixed_set_rate"]
