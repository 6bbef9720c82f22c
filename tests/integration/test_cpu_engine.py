"""Runs the files that need SGLang's CPU engine in a process that has it from the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_vericache.cpu import engine

HERE = Path(__file__).resolve().parent
FILES = [p for p in sorted(HERE.glob("test_*.py")) if "\ncpu_engine.required()\n" in p.read_text()]
# Importing SGLang takes about ten seconds of an idle core; this leaves room for a busy machine.
TIMEOUT_S = 420


@pytest.mark.skipif(engine.in_use(), reason="this process has the CPU engine itself")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in refuses machines with a GPU")
@pytest.mark.parametrize("marked", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_files_that_need_the_engine(marked):
    """Catches files that are skipped everywhere: here they must run, every test of them."""
    assert FILES
    # -P: the checkout's `kernels` folder must not hide the distribution of that name.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked]
    done = subprocess.run(
        [*command, *map(str, FILES)],
        env=engine.environment(dict(os.environ)),
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]
