"""The patches of patches/ apply and are complete, and the plugin passes its tests on them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import patched_sglang
import pytest
import torch
from patched_sglang import FOLDER, PATCHES

from sglang_vericache.cpu import engine
from sglang_vericache.hooks import flag_hooks, server_hooks

HERE = Path(__file__).resolve().parent
HOOKS = (*flag_hooks(), *server_hooks())
# Run on the patched SGLang: what the patches do, and what must not depend on them.
FILES = (
    *("test_patched_scheduler.py", "test_patched_plugins.py", "test_patched_forward.py"),
    *("test_patched_frontend.py", "test_patched_responses.py", "test_http_routes.py"),
    *("test_loud_failure.py", "test_bad_input.py", "test_pending_tokens.py"),
    *("test_pool_room.py", "test_first_tokens.py"),
)
TIMEOUT_S = 600


def names(patches) -> list[str]:
    return [patch.name for patch in patches]


@pytest.mark.parametrize("patch", PATCHES, ids=names(PATCHES))
def test_applies_alone(patch, tmp_path):
    """Catches a patch that needs another one, or was made against another release."""
    target = patched_sglang.link_sglang(tmp_path, [patch])
    patched_sglang.apply(target, [patch], "--check")
    patched_sglang.apply(target, [patch])
    compile_files(target, [patch])


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
def test_apply_one_after_the_other(order, tmp_path):
    """Catches two patches that touch the same lines."""
    target = patched_sglang.link_sglang(tmp_path)
    for patch in PATCHES[::order]:
        patched_sglang.apply(target, [patch], "--check")
        patched_sglang.apply(target, [patch])
    compile_files(target, PATCHES)


def test_apply_all_at_once(tmp_path):
    """Catches what only shows when nobody looks between two patches."""
    target = patched_sglang.link_sglang(tmp_path)
    patched_sglang.apply(target, PATCHES, "--check")
    patched_sglang.apply(target, PATCHES)
    compile_files(target, PATCHES)
    patched_sglang.apply(target, PATCHES[::-1], "--check", "--reverse")


def compile_files(target: Path, patches) -> None:
    for name in {name for patch in patches for name in patched_sglang.files_of(patch)}:
        assert name.suffix == ".py"
        compile((target / name).read_text(), str(name), "exec")


def test_the_installed_sglang_is_untouched(tmp_path):
    """Catches an overlay that writes through its links."""
    name = Path("sglang/srt/server_args.py")
    installed = patched_sglang.link_sglang(tmp_path / "links", []) / name
    before = installed.read_bytes()
    patched = patched_sglang.patch_sglang(tmp_path / "patched") / name
    assert patched.read_bytes() != before == installed.read_bytes()


def test_patches_name_nobody():
    """Catches a change that only makes sense for us."""
    for patch in PATCHES:
        assert "vericache" not in patch.read_text().lower(), patch.name


def test_every_hook_has_its_patch():
    """Catches a hook without a way out, and one whose patch was renamed."""
    for hook in HOOKS:
        assert hook.patch in names(PATCHES), hook.target
        assert hook.unless is not None, hook.target
        added = hook.unless.rpartition(".")[2]
        if hook.patch != "0001-plugin-server-args.patch":  # adds a mechanism, we the field
            text = (FOLDER / hook.patch).read_text()
            assert re.search(rf"(?m)^\+.*\b{added}\b", text), f"{hook.patch} adds no {added}"


def table() -> dict[str, list[str]]:
    """Rows of the README's table by patch."""
    text = (FOLDER / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {match[1]: row for row in rows if (match := re.search(r"\((\S+\.patch)\)", row[0]))}


def test_the_readme_lists_all():
    """Catches a patch that nobody explains, and a hook that the table forgets."""
    rows = table()
    assert sorted(rows) == names(PATCHES)
    for patch, row in rows.items():
        assert len(row) == 5 and all(cell.strip() for cell in row), patch
        hooks = {hook.target for hook in HOOKS if hook.patch == patch}
        named = set(re.findall(r"`(sglang\.[\w.]+)`", row[1]))
        assert named == hooks, patch
        assert hooks or "no hook" in row[1], patch
        assert re.search(r"#\d+|none found", row[3]), patch


def test_the_fields_are_installed():
    """Catches an installation from before there was this entry point."""
    found = [e.value for e in entry_points(group="sglang.srt.server_args") if e.name == "vericache"]
    assert found == ["sglang_vericache.server_fields:VeriCacheFields"], "pip install -e . again"


@pytest.mark.skipif(engine.in_use(), reason="test_cpu_engine.py's process, which runs one SGLang")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in refuses machines with a GPU")
def test_on_the_patched_sglang(tmp_path):
    """Catches patches that apply and do nothing, and a plugin that does not notice them."""
    env = engine.environment(dict(os.environ))
    env |= patched_sglang.environment(patched_sglang.patch_sglang(tmp_path))
    # -P: the checkout's `kernels` folder must not hide the distribution of that name.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in FILES)],
        env=env,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]
