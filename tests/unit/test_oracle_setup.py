"""The Makefile installs kvpress and says so to the tests, which would be skipped otherwise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORACLE_TESTS = ROOT / "tests" / "unit" / "test_against_kvpress.py"


def plan_of(target: str, venv: str) -> str:
    """The commands of a target, everything taken to be out of date."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target, f"VENV={venv}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("target", ["setup", "demo", "test", "test-long"])
def test_make_installs_it(target, tmp_path):
    """Catches an oracle that is only on the machine of whoever wrote the test, and one installed
    with its dependencies: pip would take another transformers than SGLang's."""
    lines = [line for line in plan_of(target, str(tmp_path)).splitlines() if "kvpress" in line]
    assert len(lines) == 1
    assert re.search(r"pip install --no-deps kvpress==0\.5\.5$", lines[0])


@pytest.mark.parametrize("target", ["test", "test-long"])
def test_make_tells_the_tests(target, tmp_path):
    """Catches the promise left out of one of the two: its tests would be skipped unseen."""
    lines = [line for line in plan_of(target, str(tmp_path)).splitlines() if "-m pytest" in line]
    (everything,) = [line for line in lines if not line.endswith("tests/kernels")]
    assert everything.startswith("VERICACHE_REQUIRE_KVPRESS=1 ")


@pytest.mark.parametrize(("promised", "outcome"), [("", "1 skipped"), ("1", "1 error")])
def test_missing_oracle(promised, outcome, tmp_path):
    """Catches a skip where `make test` has promised the oracle, and an error where it has not."""
    broken = tmp_path / "kvpress.py"
    broken.write_text("raise ImportError('nothing here')")
    env = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "VERICACHE_REQUIRE_KVPRESS": promised,
    }
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(ORACLE_TESTS)], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert outcome in done.stdout
    assert "nothing here" in done.stdout
