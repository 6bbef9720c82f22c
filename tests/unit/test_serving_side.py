"""One side of a comparison: what it saves, what it passes on, what it does when a case fails."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import pytest

from benchmarks.registry import REPLAY, Case
from benchmarks.serving import case_prompts, side
from benchmarks.serving.rescore import Rescored
from benchmarks.serving.selection import Selection, write_selections
from benchmarks.serving.side import Options, Side, SideError, SideRun, check_order

CASE = Case("one", "", "", 80, 2, None, "serving", repeats=1)
OTHER = replace(CASE, name="other")
PLAIN, OURS = Side("plain", ""), Side("ours", "--enable-vericache")


class Server:
    """Stands in for ServingServer; remembers how it was started."""

    started: ClassVar[list] = []
    alive = True
    start_seconds = 1.5

    def __init__(self, model, log, flags, plugin, replay):
        self.plugin, self.simulated = plugin, replay and f"label of {replay}"
        self.log, self.url = log, "http://nowhere"
        self.flushed = 0
        Server.started.append((model, flags, plugin, replay))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def flush(self):
        self.flushed += 1

    def recovers(self):
        return self.alive

    def stop(self):
        self.alive = False

    def pace(self):
        assert self.plugin
        return {"rounds_in_parts": 3}

    def last_words(self):
        return f"MemoryError: none; see {self.log}"


@pytest.fixture(autouse=True)
def fakes(monkeypatch, tmp_path):
    monkeypatch.setenv("VERICACHE_COMMIT", "abcdef1")
    monkeypatch.setattr(Server, "started", [])
    monkeypatch.setattr(Server, "alive", True)
    monkeypatch.setattr(side, "ServingServer", Server)
    monkeypatch.setattr(side, "Traffic", lambda *_: nullcontext())
    monkeypatch.setattr(side, "STARTED", tmp_path / "started")
    monkeypatch.setattr(side, "device_name", lambda: "H100")
    monkeypatch.setattr(side, "version", lambda name: "0.5.23")
    monkeypatch.setattr(side, "measure", lambda *_: {"runs": [], "outputs": [[1]]})


def options(folder, **values) -> Options:
    return Options(folder, "shape:tiny", "--common", REPLAY, **values)


def test_what_is_saved(tmp_path):
    """Catches figures without their origin, and a side that overwrites the one before."""
    for number, one in enumerate((PLAIN, OURS, PLAIN)):
        run = SideRun(one, options(tmp_path))
        assert run.measure([CASE]) == {}
        assert run.path.name == f"run-{number:02d}-{one.name}.json"
    plain, ours, _ = (record for _, record in side.read_runs(tmp_path))
    assert plain["gpu"] == "H100" and plain["commit"] == "abcdef1" and plain["start_s"] == 1.5
    assert plain["cases"]["one"]["outputs"] == [[1]]
    assert ours["flags"] == "--common --enable-vericache"
    assert ours["cases"]["one"]["pace"] == {"rounds_in_parts": 3}
    assert "pace" not in plain["cases"]["one"]


def test_only_ours_is_replayed_and_says_so(tmp_path):
    """Catches a baseline with the plugin, and a replayed record without its label."""
    for one in (PLAIN, OURS):
        SideRun(one, options(tmp_path)).measure([CASE])
    assert [(plugin, replay) for _, _, plugin, replay in Server.started] == [
        (False, None),
        (True, REPLAY),
    ]
    plain, ours = (record for _, record in side.read_runs(tmp_path))
    assert plain["simulated"] is None and ours["simulated"] == f"label of {REPLAY}"


def test_a_case_that_fails(tmp_path, monkeypatch):
    """Catches a failure that costs the figures of the other cases, or is not told."""

    def measure(server, case, *_):
        if case.name == "one":
            raise RuntimeError("too large")
        return {"runs": [], "outputs": []}

    monkeypatch.setattr(side, "measure", measure)
    run = SideRun(PLAIN, options(tmp_path))
    assert run.measure([CASE, OTHER]) == {"one": "RuntimeError: too large"}
    record = json.loads(run.path.read_text())
    assert list(record["cases"]) == ["other"] and "too large" in record["failed"]["one"]


def test_the_first_start_on_a_machine_says_so(tmp_path):
    """Catches a start that compiles kernels and counts as any other."""
    for one in (PLAIN, OURS):
        SideRun(one, options(tmp_path)).measure([CASE])
    records = [record for _, record in side.read_runs(tmp_path)]
    assert [record["first_start"] for record in records] == [True, False]


def test_only_rescoring_asks_for_half_as_many(tmp_path, monkeypatch):
    """Catches device time for a figure that no row shows."""
    asked = []

    def measure(server, case, prompts, repeats, seconds, itself, tick):
        asked.append(itself)
        return {"outputs": []}

    monkeypatch.setattr(side, "measure", measure)
    monkeypatch.setattr(side, "rescore", lambda *_: Rescored())
    for one, rescores in ((PLAIN, False), (OURS, True), (PLAIN, True)):
        SideRun(one, options(tmp_path, rescores=rescores)).measure([CASE])
    assert asked == [False, False, True]


def test_a_server_that_ends(tmp_path, monkeypatch, capsys):
    """Catches cases that are sent to nobody, and a failure that does not say where to look."""

    def measure(server, case, *_):
        if case.name == "other":
            monkeypatch.setattr(Server, "alive", False)
            raise OSError("connection reset")
        return {"outputs": []}

    monkeypatch.setattr(side, "measure", measure)
    third = replace(CASE, name="third")
    run = SideRun(PLAIN, options(tmp_path))
    failed = run.measure([CASE, OTHER, third])
    assert "OSError: connection reset" in failed["other"] and "MemoryError" in failed["other"]
    assert str(run.path.with_suffix(".log")) in failed["other"]
    assert "not measured" in failed["third"]
    assert list(json.loads(run.path.read_text())["cases"]) == ["one"]
    assert "FAILED plain: other" in capsys.readouterr().out


def test_an_interruption(tmp_path, monkeypatch):
    """Catches figures that are lost because a later case was interrupted."""

    def measure(server, case, *arguments):
        if case.name == "other":
            arguments[-1]("closed loop")
            raise SystemExit(143)
        return {"outputs": []}

    monkeypatch.setattr(side, "measure", measure)
    run = SideRun(PLAIN, options(tmp_path))
    with pytest.raises(SystemExit):
        run.measure([CASE, OTHER])
    record = json.loads(run.path.read_text())
    assert list(record["cases"]) == ["one"] and record["failed"] == {}
    assert list(record["spent_s"]) == ["server", "one", "other"]
    assert [path.name for path in side.run_files(tmp_path)] == ["run-00-plain.json"]
    with pytest.raises(SystemExit):  # nothing was done by then: no file of nothing
        SideRun(PLAIN, options(tmp_path)).measure([OTHER])
    assert len(side.run_files(tmp_path)) == 1


def test_numbers_of_runs(tmp_path):
    """Catches a run that takes the place of another after one was removed."""
    (tmp_path / "run-03-plain.json").write_text("{}")
    assert SideRun(OURS, options(tmp_path)).path.name == "run-04-ours.json"


def test_only_new_outputs_are_rescored(tmp_path, monkeypatch):
    """Catches device time for outputs that an earlier server has scored, and a control that has an
    advantage: outputs of the very keys and values that they are scored by."""
    asked, starts = [], iter(range(5))
    monkeypatch.setattr(side, "measure", lambda *_: {"outputs": [[next(starts)]]})
    monkeypatch.setattr(side, "rescore", lambda *given: asked.append(given[-1]) or Rescored())
    for one in (OURS, PLAIN, PLAIN, OURS, PLAIN):
        SideRun(one, options(tmp_path, rescores=True)).measure([CASE])
    found = [r["cases"]["one"].get("rescored") for _, r in side.read_runs(tmp_path)]
    assert [f and list(f) for f in found] == [
        *(None, ["run-00-ours.json"], {}, None, ["run-03-ours.json"])
    ]
    assert asked == [[[0]], [[1]], [[3]], [[1]]], "and each time a plain server's, once its own"
    own = ["own_rescored" in r["cases"]["one"] for _, r in side.read_runs(tmp_path)]
    assert own == [False, True, False, False, True]


def test_a_control_of_the_same_prompts(tmp_path, monkeypatch):
    """Catches a control behind prompts that it did not answer, or of another backend, and outputs
    of ours that are rescored behind others' prompts."""
    asked, sizes = [], iter((1, 1, 2, 2, 2, 2))

    def measure(*_):
        size = next(sizes)
        return {"outputs": [[size]], "requests": size}

    monkeypatch.setattr(side, "measure", measure)
    monkeypatch.setattr(side, "rescore", lambda *given: asked.append(given[-1]) or Rescored())
    other = replace(PLAIN, flags="--attention-backend triton")
    for one in (PLAIN, OURS, OURS, other, PLAIN, OURS):
        SideRun(one, options(tmp_path, rescores=True)).measure([CASE])
    records = [record["cases"]["one"] for _, record in side.read_runs(tmp_path)]
    # The fourth scores the second of ours, the first being of other prompts; then its own.
    assert asked == [[[2]], [[2]]]
    assert records[3]["own_rescored"]["of"] == "the same start"
    assert list(records[3]["rescored"]) == ["run-02-ours.json"] and not records[4]["rescored"]


@pytest.mark.parametrize("arrivals, says", [(None, "no prompts"), (0.7, "capacity")])
def test_no_start_for_nothing(tmp_path, arrivals, says):
    """Catches a minute of a server that lacks what an unmodified one must find out before."""
    real, case = replace(options(tmp_path), model="some/model"), replace(CASE, arrivals=arrivals)
    check_order([PLAIN, OURS], [case], real)
    with pytest.raises(SideError, match=says):
        check_order([OURS, PLAIN], [case], real)
    if arrivals is None:
        check_order([OURS], [case], options(tmp_path))  # a shape has random prompts
    (tmp_path / "rates.json").write_text('{"one": 10.0}')
    choice = Selection(CASE.context, CASE.tokens, (1, 2), "digest", 9, "model")
    write_selections(tmp_path / "chosen.json", {"another": choice})
    check_order([OURS], [case], real)


def test_ours_chooses_no_prompts(tmp_path, monkeypatch):
    """Catches prompts that are chosen by the answers of the server that they are to test."""
    monkeypatch.setattr(case_prompts.Prompts, "of_model", lambda model: None)
    real = replace(options(tmp_path), model=str(tmp_path / "model"))
    failed = SideRun(OURS, real).measure([CASE])
    assert "no prompts are chosen for one" in failed["one"]
    assert Server.started[-1][3] is None  # real weights accept for real


def test_why_nobody_chose(tmp_path, monkeypatch):
    """Catches a message that sends the reader to a plain side which has failed just before."""

    def of_model(model):
        raise ImportError("no tokenizer")

    monkeypatch.setattr(case_prompts.Prompts, "of_model", of_model)
    real = replace(options(tmp_path), model=str(tmp_path / "model"))
    assert SideRun(PLAIN, real).measure([CASE])["one"] == "ImportError: no tokenizer"
    failed = SideRun(OURS, real).measure([CASE])["one"]
    assert failed.startswith("NotChosenError: no prompts are chosen for one")
    assert failed.endswith("(plain failed: ImportError: no tokenizer)")


def test_arrivals_need_a_capacity(tmp_path):
    failed = SideRun(OURS, options(tmp_path)).measure([replace(CASE, arrivals=0.7)])
    assert "measure a plain side first" in failed["one"]
