"""The demo in a checkout's root, whose kernels/ has the name of a package that SGLang needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sglang_vericache.demo.server import Server

ROOT = Path(__file__).resolve().parent.parent.parent
LOOK = "from importlib.util import find_spec as f; print(getattr(f('kernels'), 'origin', None)); "
DEMO = "from sglang_vericache.demo import __main__ as d; d._run = lambda _: 0; d.main([]); "


def kernels_found(code: str, environment: dict[str, str]) -> str:
    """Where Python finds the package when it runs ``code`` in the root."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def test_the_demo_itself():
    """Catches a tokenizer that cannot be loaded where the demo was started as the README says."""
    environment = os.environ | {"PYTHONPATH": ""}
    assert kernels_found(LOOK, environment) == str(ROOT / "kernels" / "__init__.py")
    assert not kernels_found(DEMO + LOOK, environment).startswith(str(ROOT / "kernels"))


def test_its_servers(monkeypatch, tmp_path):
    """Catches a server that inherits the current directory and imports from it."""
    monkeypatch.setenv("PYTHONPATH", "")
    server = Server("any", tmp_path, tmp_path / "log")
    assert not kernels_found(LOOK, server._environment).startswith(str(ROOT / "kernels"))
