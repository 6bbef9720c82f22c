"""``python -m sglang_vericache bench``: found from a checkout, clear about what it cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import __main__ as command
from benchmarks.serving.side import common_flags
from sglang_vericache import cli

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def at_a_commit(monkeypatch):
    monkeypatch.setenv("VERICACHE_COMMIT", "abcdef1")
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("a server would start"))


BY_COMMAND = "from sglang_vericache.cli import main; code = main(['bench', '--order', '', {}]); "
BY_MODULE = "from benchmarks.serving.__main__ import main; code = main(['--order', '', {}]); "
# As transformers looks, which takes whatever has the name; and as a subprocess does.
LOOK = (
    "import importlib.util, os, sys; found = importlib.util.find_spec('kernels'); "
    "print('kernels at', found and found.origin); print('for others', os.environ['PYTHONPATH']); "
    "sys.exit(code)"
)


@pytest.mark.parametrize(
    "code, folder, path",
    [
        pytest.param(BY_COMMAND, None, "", id="command-elsewhere"),
        pytest.param(BY_COMMAND, ROOT, "", id="command-in-the-root"),
        pytest.param(BY_COMMAND, None, str(ROOT), id="command-python-path"),
        pytest.param(BY_COMMAND, ROOT, os.pathsep.join([".", "/mine", ""]), id="command-relative"),
        pytest.param(BY_MODULE, ROOT, str(ROOT), id="module-in-the-root"),
    ],
)
def test_from_a_checkout_whatever_the_current_directory(tmp_path, code, folder, path):
    """Catches a command that makes our kernels/ pass for SGLang's own: its root comes to the path
    as the current directory or by PYTHONPATH, which servers inherit."""
    done = subprocess.run(
        [sys.executable, "-c", code.format(f"'--out', {str(tmp_path)!r}") + LOOK],
        cwd=folder or tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing to compare" in done.stdout
    at, others = done.stdout.splitlines()[-2:]
    assert at.startswith("kernels at ") and str(ROOT / "kernels") not in at
    assert others.removeprefix("for others ") == ("/mine" if "/mine" in path else "")


def test_without_a_checkout(monkeypatch, tmp_path, capsys):
    """Catches a traceback where the wheel alone is installed."""
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "sglang_vericache" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "checkout" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--order", "plain"], "--case"),
        (["--case", "smol-1k-x1", "--order", "theirs"], "plain, ours"),
        (["--case", "smol-1k-x1", "--order", "ours1"], "ours1"),
    ],
)
def test_bad_sides(tmp_path, capsys, arguments, says):
    assert command.main([*arguments, "--out", str(tmp_path)]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--repeats", "0"], "at least 1"),
        (["--tokens", "32"], "at least 33"),
        (["--seconds", "-1"], "--seconds"),
        (["--case", "nothing"], "smol-7k7-x256"),
    ],
)
def test_bad_values(capsys, arguments, says):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert says in capsys.readouterr().err


def test_an_unknown_shape(monkeypatch, tmp_path, capsys):
    """Catches a traceback."""
    monkeypatch.undo()
    monkeypatch.setenv("VERICACHE_COMMIT", "abcdef1")
    arguments = ["--case", "mine:9:1", "--model", "shape:huge", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "8b, 24b, tiny" in capsys.readouterr().err


def test_cases_of_two_models(monkeypatch, tmp_path, capsys):
    """Catches a case that is measured on another model than its own."""
    monkeypatch.undo()
    monkeypatch.setenv("VERICACHE_COMMIT", "abcdef1")
    cases = ["--case", "smol-1k-x1", "--case", "8b-1k-x1"]
    assert command.main([*cases, "--out", str(tmp_path)]) == 1
    assert "one model" in capsys.readouterr().err


def test_flags_by_the_model():
    """Catches weights or a tokenizer asked of a shape that has none."""
    assert "--load-format dummy" in common_flags("shape:8b")
    assert "dummy" not in common_flags("/models/smol")
