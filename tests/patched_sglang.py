"""The installed SGLang with the patches of patches/ applied, in a folder of links.

Linking what no patch touches makes it in milliseconds and without a second copy of SGLang;
imports see ordinary modules in the folder that comes first.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from sglang_vericache.cpu.engine import KERNEL_LIBRARY

FOLDER = Path(__file__).resolve().parent.parent / "patches"
PATCHES = tuple(sorted(FOLDER.glob("*.patch")))
# Set in processes that run on the patched SGLang.
SWITCH = "VERICACHE_TEST_PATCHED"
# Patches are against SGLang's repository: a/python/sglang/...
_STRIP = 2


def files_of(patch: Path) -> list[Path]:
    """Files that ``patch`` changes, relative to the folder that holds the package."""
    return [Path(name) for name in re.findall(r"(?m)^\+\+\+ b/python/(\S+)", patch.read_text())]


def link_sglang(target: Path, patches: Iterable[Path] = PATCHES) -> Path:
    """Make ``target``/sglang, unpatched, with real files where one of ``patches`` changes them."""
    original = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    copy = target / "sglang"
    _link_entries(original, copy)
    for name in sorted({name for patch in patches for name in files_of(patch)}):
        inside = name.relative_to("sglang")
        for folder in [*inside.parents][-2::-1]:
            if (copy / folder).is_symlink():
                (copy / folder).unlink()
                _link_entries(original / folder, copy / folder)
        (copy / inside).unlink()
        shutil.copyfile(original / inside, copy / inside)
    return target


def _link_entries(original: Path, copy: Path) -> None:
    copy.mkdir(parents=True)
    for entry in original.iterdir():
        if entry.name != "__pycache__":
            (copy / entry.name).symlink_to(entry)


def apply(target: Path, patches: Iterable[Path], *options: str) -> None:
    """``git apply`` in a folder made by `link_sglang`.

    Raises:
        AssertionError: with what git says.
    """
    command = ["git", "apply", f"-p{_STRIP}", *options, *map(str, patches)]
    # A folder inside of a checkout would be taken for a part of it.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(target.parent)}
    done = subprocess.run(command, cwd=target, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def patch_sglang(target: Path) -> Path:
    """`link_sglang` with all patches applied."""
    apply(link_sglang(target), PATCHES)
    return target


def environment(target: Path) -> Mapping[str, str]:
    """Variables of a process that imports SGLang from ``target``, with the CPU stand-in."""
    return {SWITCH: "1", "PYTHONPATH": os.pathsep.join([str(KERNEL_LIBRARY), str(target)])}


def in_use() -> bool:
    return os.environ.get(SWITCH) == "1"


def required() -> None:
    """Skip the calling test file on any other SGLang; test_patches.py runs it on this one."""
    if not in_use():
        pytest.skip("needs a patched SGLang; test_patches.py runs this", allow_module_level=True)
