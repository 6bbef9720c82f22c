"""SGLang only logs what goes wrong in a plugin; using the flag must raise it."""

from __future__ import annotations

import cpu_engine
import pytest

cpu_engine.required()

from sglang.srt.plugins import load_plugins  # noqa: E402

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
    from pkgutil import resolve_name

    for hook in (*hooks.flag_hooks(), *hooks.server_hooks()):
        owner, _, name = hook.target.rpartition(".")
        assert hasattr(getattr(resolve_name(owner), name), "__wrapped__"), hook.target


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
