"""Measures registered cases, after the tests: figures of a broken build are not figures."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import registry, rows

ROOT = Path(__file__).resolve().parent.parent
FAST_TESTS = ("-m", "not gpu and not long and not e2e")
GPU_TESTS = ("-m", "gpu", "tests/kernels")
# A hash of fewer digits says too little.
LEAST_HASH_DIGITS = 7

Call = Callable[[Sequence[str], dict[str, str]], int]


class RefusedError(RuntimeError):
    """Nothing was measured; the message says why."""


def call(command: Sequence[str], environ: dict[str, str]) -> int:
    print("+", shlex.join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, env=environ).returncode


def test_runs(device: str) -> list[list[str]]:
    """The pytest commands whose success is asked for on this device."""
    pytest = [sys.executable, "-m", "pytest", "-q"]
    wanted = [FAST_TESTS] if device == "cpu" else [FAST_TESTS, GPU_TESTS]
    return [[*pytest, *selection] for selection in wanted]


def require_green(commit: str, passed_at: str | None, device: str, run: Call = call) -> None:
    """Run the tests, or take it from the user that they passed at exactly this commit.

    Args:
        commit: as rows.commit() gives it: a plus at its end marks uncommitted changes.

    Raises:
        RefusedError: a test failed, the commit is unknown, or is not the one that passed.
    """
    if commit.startswith("unknown"):
        raise RefusedError("no commit to write into the rows: set VERICACHE_COMMIT")
    if passed_at is None:
        for tests in test_runs(device):
            if run(tests, dict(os.environ)):
                raise RefusedError(f"tests failed, nothing is measured: {shlex.join(tests)}")
    elif commit.endswith("+"):
        raise RefusedError(f"this is {commit[:-1]} with changes: no tests can have passed at it")
    elif len(passed_at) < LEAST_HASH_DIGITS or not _same(passed_at, commit):
        raise RefusedError(f"tests passed at {passed_at}, but this is {commit}")


def _same(one: str, other: str) -> bool:
    """Whether two hashes of different length can mean the same commit."""
    return one.startswith(other) or other.startswith(one)


def measure(
    names: Sequence[str],
    arguments: Sequence[str] = (),
    passed_at: str | None = None,
    run: Call = call,
) -> int:
    """Number of measures that failed.

    Raises:
        registry.UnknownCaseError, RefusedError: before anything is measured.
    """
    commands = registry.commands_of([registry.find(name) for name in names], arguments)
    commit = rows.commit()
    require_green(commit, passed_at, rows.device_name(), run)
    # The rows name the command that ran the tests as well, and the commit the tests saw, even if
    # a file changes during an hour of measuring.
    environ = os.environ | {"VERICACHE_COMMAND": rows.command(), "VERICACHE_COMMIT": commit}
    return sum(run([sys.executable, "-m", *command], environ) != 0 for command in commands)
