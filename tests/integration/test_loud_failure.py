"""SGLang only logs what goes wrong in a plugin; using the flag must raise it."""

from __future__ import annotations

import cpu_engine
import patched_sglang
import pytest

cpu_engine.required()

from sglang.srt.plugins import load_plugins  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: E402

load_plugins()

from sglang_vericache import hooks, plugin  # noqa: E402
from sglang_vericache.cli import main  # noqa: E402


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(plugin, "_failures", [])
    monkeypatch.delenv("_SGLANG_VERICACHE_ARMED", raising=False)


def test_all_hook_targets_exist(capsys):
    """Each dotted path against the pinned SGLang."""
    assert main(["check"]) == 0
    table = capsys.readouterr().out
    assert "FAIL" not in table and "all good" in table
    for hook in (*hooks.flag_hooks(), *hooks.server_hooks()):
        assert hook.target in table
        assert hook.reason and hook.patch.endswith(".patch")


def test_arming_applies_every_hook():
    """A hook that is registered but not applied would leave SGLang unmodified."""
    plugin.arm()
    for hook in (*hooks.flag_hooks(), *hooks.server_hooks()):
        # patches/ makes all of them unnecessary; test_patches.py runs this file so.
        assert hook.needed != patched_sglang.in_use(), hook.target
        assert plugin.is_applied(hook) == hook.needed, hook.target
        assert (hook.target in plugin.applied_hooks()) == hook.needed


class Hooked:
    """Stands for a class of SGLang."""

    def name(self) -> str:
        return "sglang"


def test_a_function_that_another_plugin_has_wrapped(monkeypatch):
    """Catches a hook that SGLang skips: it applies those of a target once."""
    target = f"{__name__}.Hooked.name"
    HookRegistry.register(target, lambda result, self: f"other({result})", HookType.AFTER)
    HookRegistry.apply_hooks()
    ours = hooks.Hook(target, "after", lambda result, self: f"ours({result})", "a test", "none")
    monkeypatch.setattr(plugin, "server_hooks", lambda: (ours,))
    plugin.arm()
    plugin.arm()
    assert Hooked().name() == "ours(other(sglang))"
    assert plugin.is_applied(ours)


def test_a_hook_that_is_not_needed_is_left_out(monkeypatch, capsys):
    """Catches a hook beside the feature that replaces it: both would act."""
    known = "sglang.srt.managers.scheduler.Scheduler"
    idle = hooks.Hook(f"{known}.gone", "around", print, "a test", "none", f"{known}.__init__")
    monkeypatch.setattr(plugin, "server_hooks", lambda: (idle,))
    monkeypatch.setattr(hooks, "server_hooks", lambda: (idle,))
    plugin.arm()
    assert f"{known}.gone" not in HookRegistry._hooks
    assert main(["check"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if f"{known}.gone" in line]
    assert row.endswith("not needed")


def test_another_release_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(plugin, "installed_sglang", lambda: "0.5.24")
    with pytest.raises(plugin.PluginError, match=r"needs sglang==0\.5\.23, found 0\.5\.24"):
        plugin.arm()
    assert main(["check"]) == 1
    assert "0.5.24" in capsys.readouterr().out


def test_another_release_is_left_alone(monkeypatch):
    """Installed beside another SGLang and not used, the plugin hooks nothing."""
    monkeypatch.setattr(plugin, "installed_sglang", lambda: "0.5.24")
    monkeypatch.setattr(plugin, "_register", lambda hooks: pytest.fail("hooked"))
    plugin.activate()
    monkeypatch.setenv("SGLANG_VERICACHE_ENABLE", "0")
    plugin.activate()


@pytest.mark.parametrize("way", ["flag", "variable", "armed"])
def test_another_release_says_so_where_the_flag_is_used(monkeypatch, way):
    """Catches `unrecognized arguments`, which names no reason, and a server that runs without
    drafting because the variable means nothing to it."""
    monkeypatch.setattr(plugin, "installed_sglang", lambda: "0.5.24")
    if way == "flag":
        monkeypatch.setattr("sys.argv", ["launch_server", "--enable-vericache"])
    else:
        names = {"variable": "SGLANG_VERICACHE_ENABLE", "armed": "_SGLANG_VERICACHE_ARMED"}
        monkeypatch.setenv(names[way], "1")
    with pytest.raises(SystemExit, match=r"needs sglang==0\.5\.23, found 0\.5\.24"):
        plugin.activate()
    monkeypatch.setenv("SGLANG_VERICACHE_ENABLE", "perhaps")
    monkeypatch.setattr("sys.argv", ["launch_server"])
    monkeypatch.delenv("_SGLANG_VERICACHE_ARMED", raising=False)
    with pytest.raises(SystemExit, match="neither yes nor no"):
        plugin.activate()


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("sglang.srt.managers.scheduler.Scheduler.renamed", "is missing"),
        ("sglang.srt.no_such_module.function", "cannot be imported"),
    ],
)
def test_a_missing_target_stops_the_flag(monkeypatch, capsys, target, why):
    broken = hooks.Hook(target, "around", lambda original: None, "a test", "none.patch")
    monkeypatch.setattr(plugin, "server_hooks", lambda: (broken,))
    monkeypatch.setattr(hooks, "server_hooks", lambda: (broken,))
    with pytest.raises(plugin.PluginError, match=f"hook target {target} {why}"):
        plugin.arm()
    assert main(["check"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_failed_registration_stops_the_flag(monkeypatch):
    def broken():
        raise RuntimeError("no such registry")

    monkeypatch.setattr(plugin, "_register_algorithm", broken)
    with pytest.raises(plugin.PluginError, match="speculative algorithm: RuntimeError: no such"):
        plugin.arm()


def test_an_armed_child_that_fails_exits(monkeypatch):
    """In a spawned process an exception would be logged, and the server would run without us."""
    monkeypatch.setenv("_SGLANG_VERICACHE_ARMED", "1")
    broken = hooks.Hook("sglang.srt.gone.function", "around", print, "a test", "none.patch")
    monkeypatch.setattr(plugin, "server_hooks", lambda: (broken,))
    with pytest.raises(SystemExit, match=r"hook target sglang\.srt\.gone"):
        plugin.activate()
