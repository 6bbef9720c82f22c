"""The wheel, built from a copy of the sources and installed where the checkout cannot be seen.

No network: the build uses this environment's setuptools, the installation takes no dependencies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from sglang_vericache import __version__

ROOT = Path(__file__).resolve().parent.parent.parent
BUILT_FROM = ("sglang_vericache", "kernels", "pyproject.toml", "README.md", "LICENSE")


def run(command: list[str], folder: Path) -> str:
    """Output of a command that must succeed, run where neither folder nor variable leads home."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environ = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # A copy, because a build leaves folders that the next one would take files from.
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, sources / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, sources / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--no-index", "--wheel-dir", str(folder), str(sources)], folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Interpreter of an environment with the wheel, and SGLang as this environment has it."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    interpreter = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", str(wheel)], folder)
    # A folder named in a .pth has its own .pth files ignored, among them the one that leads an
    # editable installation to the checkout.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return interpreter


def test_the_wheel_holds_all_sources(wheel):
    """Catches a module that only an editable installation finds."""
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    wanted = set()
    for folder, package in (("sglang_vericache", ""), ("kernels", "sglang_vericache/")):
        for path in (ROOT / folder).rglob("*.py"):
            wanted.add(package + path.relative_to(ROOT).as_posix())
    assert packed == wanted


def test_the_kernels_come_from_the_wheel(python):
    """Catches a mapped folder that lands somewhere else than the package says."""
    code = (
        "import sglang_vericache, sglang_vericache.kernels as kernels\n"
        "from sglang_vericache.kernels import dispatch, pool_format\n"
        "import sglang_vericache.kernels.draft_attention\n"
        "print(sglang_vericache.__file__, kernels.__path__[0], pool_format.__file__, sep='\\n')"
    )
    for path in run([str(python), "-c", code], python.parent).splitlines():
        assert Path(path).is_relative_to(python.parent.parent), path


def test_the_command_runs(python):
    """Catches an installation whose command or entry point is missing."""
    script = python.parent / "sglang-vericache"
    assert "usage:" in run([str(script), "check", "--help"], python.parent)
    told = run([str(python), "-m", "sglang_vericache", "check"], python.parent)
    assert f"sglang-vericache  {__version__}".split() in [
        line.split()[1:] for line in told.splitlines()
    ]
    assert "sglang_vericache.plugin:activate" in told
