"""Benchmarks: names mean one thing, and nothing is measured on a broken build."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import __main__ as command_line
from benchmarks import registry, rows, runner
from benchmarks.rows import Row

HEAD = "abcdef1"


class Calls:
    """Stands in for subprocesses; ``codes`` are their exit codes by a word of the command."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.commands, self.environs = codes, [], []

    def __call__(self, command, environ) -> int:
        self.commands.append(list(command))
        self.environs.append(environ)
        return next((code for word, code in self.codes.items() if word in " ".join(command)), 0)


@pytest.fixture
def at_head(monkeypatch):
    monkeypatch.setenv("VERICACHE_COMMIT", HEAD)
    monkeypatch.setattr(rows, "device_name", lambda: "cpu")


def test_wanted_factors():
    """Catches a goal that is lowered in passing."""
    wanted = {c.name: c.least_factor for c in registry.CASES.values() if c.measure == "serving"}
    assert wanted == {
        "smol-7k7-x256": 3.0,
        "smol-7k7-x128": 2.5,
        "smol-4k-x128": 1.7,
        "smol-1k-x32": 0.98,
        "smol-1k-x1": 0.98,
        "8b-32k-x12": 2.0,
        "8b-8k-x48": 1.9,
        "8b-shared-x48": 2.5,
        "8b-1k-x32": 0.98,
        "8b-1k-x1": 0.98,
        "smol-mix": 0.97,
        "24b-16k-pool48k": 2.0,
        "24b-32k-queue16": 1.4,
        "8b-32k-queue24": 1.9,
        "8b-shared-16x4": 2.0,
        "smol-7k7-pool8": 1.7,
        "fits-anyway": None,
    }
    for case in registry.CASES.values():
        if case.least_factor == 0.98:  # so close to 1 that noise could pass
            assert case.repeats >= 7, case.name
        if case.measure == "serving" and not case.queued:
            assert case.repeats >= 3, case.name
    assert registry.serving_case("mine:100:1").repeats >= 7


def test_answers_are_long():
    """Catches fixed sets that are over before all of them run, or that exceed the model."""
    for case in registry.CASES.values():
        if case.measure == "serving" and case.arrivals is None and not case.queued:
            assert case.tokens >= 480, case.name
        if case.model == registry.SMOL:
            assert case.context + case.tokens < 8192, case.name


@pytest.mark.parametrize("name", registry.CASES)
def test_measures_exist(name):
    """Catches a case that nothing runs."""
    case = registry.CASES[name]
    assert case.name == name and case.shows
    assert importlib.util.find_spec(registry.MEASURES[case.measure][0])


def test_serving_cases():
    """Catches an ad-hoc case under a registered name, whose row would pass for that one's."""
    known = registry.find("smol-1k-x32")
    assert registry.serving_case("smol-1k-x32") == known
    assert registry.serving_case("smol-1k-x32:1024:32") == known
    case = registry.serving_case("mine:300:2")
    assert (case.name, case.context, case.requests, case.least_factor) == ("mine", 300, 2, None)
    for text in (
        "smol-1k-x32:1000:32",
        "nothing",
        "kernels",
        "mine:300",
        "mine:a:2",
        "a:1:2:3",
        "a:0:1",
    ):
        with pytest.raises(registry.UnknownCaseError):
            registry.serving_case(text)


def test_one_command_a_measure():
    """Catches a server that is started once per case, and arguments that reach the wrong one."""
    cases = [registry.find(name) for name in ("smol-1k-x1", "kernels", "smol-1k-x32")]
    assert registry.commands_of(cases, []) == [
        ["benchmarks.serving", "--case", "smol-1k-x1", "--case", "smol-1k-x32"],
        ["benchmarks.kernels"],
    ]
    assert registry.commands_of(cases[:1], ["--out", "x"])[0][-2:] == ["--out", "x"]
    with pytest.raises(registry.UnknownCaseError):
        registry.commands_of(cases, ["--out", "x"])


def test_tests_come_first(at_head):
    """Catches figures without tests, or with another commit than the one that was tested."""
    calls = Calls()
    assert runner.measure(["smol-1k-x1"], ["--repetitions", "1"], run=calls) == 0
    tests, measured = calls.commands
    assert tests[1:] == ["-m", "pytest", "-q", "-m", "not gpu and not long and not e2e"]
    assert measured[1:] == [
        *("-m", "benchmarks.serving", "--case", "smol-1k-x1", "--repetitions", "1")
    ]
    assert calls.environs[-1]["VERICACHE_COMMIT"] == HEAD
    assert calls.environs[-1]["VERICACHE_COMMAND"] == rows.command()


def test_gpu_tests_where_a_gpu_is(monkeypatch, at_head):
    """Catches kernels that are timed but not tested."""
    monkeypatch.setattr(rows, "device_name", lambda: "NVIDIA H100")
    calls = Calls()
    runner.measure(["kernels"], run=calls)
    assert calls.commands[1][-3:] == ["-m", "gpu", "tests/kernels"]
    assert len(calls.commands) == 3


@pytest.mark.parametrize("word", ["not gpu", "tests/kernels"])
def test_red_refuses(monkeypatch, at_head, word):
    """Catches a figure of a build whose tests fail."""
    monkeypatch.setattr(rows, "device_name", lambda: "NVIDIA H100")
    calls = Calls(**{word: 1})
    with pytest.raises(runner.RefusedError, match="tests failed"):
        runner.measure(["smol-1k-x1"], run=calls)
    assert not any("benchmarks.serving" in command for command in calls.commands)


@pytest.mark.parametrize("passed_at", [HEAD, HEAD + "0" * 33])
def test_tests_passed_here(at_head, passed_at):
    """Catches a machine that cannot run the tests and then cannot measure either."""
    calls = Calls()
    runner.measure(["smol-1k-x1"], passed_at=passed_at, run=calls)
    assert [command[2] for command in calls.commands] == ["benchmarks.serving"]


@pytest.mark.parametrize(
    "commit, passed_at",
    [(HEAD, "1234567"), (HEAD, "abc"), (HEAD, ""), (HEAD + "+", HEAD), ("unknown", HEAD)],
)
def test_tests_passed_elsewhere(monkeypatch, at_head, commit, passed_at):
    """Catches the escape that is used for another commit, or for uncommitted changes."""
    monkeypatch.setenv("VERICACHE_COMMIT", commit)
    calls = Calls()
    with pytest.raises(runner.RefusedError):
        runner.measure(["smol-1k-x1"], passed_at=passed_at, run=calls)
    assert not calls.commands


def test_unknown_case_runs_nothing(at_head):
    """Catches a typing error that is found after the tests."""
    calls = Calls()
    with pytest.raises(registry.UnknownCaseError, match="smol-1k-x1"):
        runner.measure(["smol"], run=calls)
    assert not calls.commands


def test_failed_measure_counts(at_head):
    """Catches a failure that the exit code hides."""
    assert runner.measure(["smol-1k-x1", "kernels"], run=Calls(serving=1)) == 1


def test_rows(monkeypatch, tmp_path, at_head):
    """Catches a row without its commit, and a command that leaves out the tests."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(rows, "version", lambda _: "0")
    monkeypatch.setenv("VERICACHE_COMMAND", "python -m benchmarks run x")
    made = Row("x", "rate", 1.0, "t", "m", "")
    rows.append("x.jsonl", made)
    rows.append("x.jsonl", made)
    first, second = rows.read("x.jsonl")
    assert first == second and first.commit == HEAD
    assert first.command == "python -m benchmarks run x"
    monkeypatch.setenv("VERICACHE_COMMIT", "unknown")
    with pytest.raises(ValueError, match="commit"):
        rows.append("x.jsonl", made)
    assert len(rows.read("x.jsonl")) == 2 and rows.read("none.jsonl") == []


def test_command_line(monkeypatch, capsys):
    """Catches arguments of a measure that the runner takes for its own."""
    asked = []
    monkeypatch.setattr(runner, "measure", lambda *arguments: asked.append(arguments) or 0)
    arguments = ["run", "kernels", "--tests-passed-at", HEAD, "--", "--op", "append"]
    assert command_line.main(arguments) == 0
    assert asked == [(["kernels"], ["--op", "append"], HEAD)]
    assert command_line.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in registry.CASES) and "3.0x" in listed
    with pytest.raises(SystemExit):
        command_line.main(["list", "--", "x"])
