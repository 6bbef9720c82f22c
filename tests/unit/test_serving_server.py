"""A server under measurement: what it is started with, and that none is left behind."""

from __future__ import annotations

import os
import sys
import time

import pytest

from benchmarks.serving import server as module
from benchmarks.serving.server import ServingServer, on_cpu


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def running(tmp_path, code: str) -> ServingServer:
    made = ServingServer("model", tmp_path / "run.log", [], plugin=False)
    made.command = [sys.executable, "-c", code]
    return made


def test_an_interruption_during_the_start(tmp_path, monkeypatch):
    """Catches a server that outlives the command which was told to end while it started."""
    one = running(tmp_path, "import time; time.sleep(60)")

    def interrupted(self):
        raise SystemExit(143)

    monkeypatch.setattr(ServingServer, "_ready", interrupted)
    with pytest.raises(SystemExit), one:
        pytest.fail("it serves")
    assert not one.alive


def test_whoever_hears_no_signal_is_ended_with_its_children(tmp_path, monkeypatch):
    """Catches children that keep the device's memory, and seconds of device time for a farewell."""
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = os.fork(); "
        f"child and open({str(tmp_path / 'child')!r}, 'w').write(str(child)); time.sleep(60)"
    )
    one = running(tmp_path, code)
    monkeypatch.setattr(ServingServer, "_ready", lambda self: (tmp_path / "child").exists())
    monkeypatch.setattr(ServingServer, "_check_acceptance", lambda self: None)
    with one:
        while not (child := (tmp_path / "child").read_text()):
            time.sleep(0.01)
        began = time.perf_counter()
    assert time.perf_counter() - began < module.GRACE_S + 5
    assert not one.alive
    deadline = time.perf_counter() + 5
    while alive(int(child)) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not alive(int(child))


def test_a_start_that_fails_names_the_log(tmp_path):
    one = running(tmp_path, "raise MemoryError('no room')")
    with pytest.raises(RuntimeError, match=r"see .*run\.log:\n(.*\n)*MemoryError: no room"), one:
        pytest.fail("it serves")


def test_last_words(tmp_path):
    """Catches a failure whose reason stays in a log that is lost with the machine."""
    one = ServingServer("model", tmp_path / "run.log", [], plugin=False)
    one.log.write_text(
        "ValueError: an older one\nTraceback (most recent call last):\n  File 'x', line 1\n"
        "torch.AcceleratorError: CUDA error: an illegal memory access\n\nReceived sigquit\n"
    )
    assert one.last_words() == (
        f"torch.AcceleratorError: CUDA error: an illegal memory access; see {one.log}"
    )
    one.log.write_text(
        "requests.exceptions.ConnectionError: /freeze_gc (Connection refused)\n"
        "[2026-01-02] Subprocess scheduler_0 (pid=14) crashed with exit code -9. Triggering\n"
    )
    assert one.last_words() == (
        f"Subprocess scheduler_0 (pid=14) crashed with exit code -9; see {one.log}"
    )
    one.log.write_text("nothing\n")
    assert one.last_words() == f"see {one.log}"


def test_nobody_answers(tmp_path):
    """Catches cases that are sent to a server that has ended."""
    one = running(tmp_path, "")
    one.url = "http://127.0.0.1:9"
    assert not one.recovers()


@pytest.mark.parametrize("plugin", [False, True])
def test_environment(tmp_path, monkeypatch, plugin):
    """Catches an unmodified server with the plugin, and a CPU server without its engine."""
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    place = "run-lengths.json:snapkv+int4had 0.2:greedy"
    found = ServingServer("m", tmp_path / "log", ["--device", "cpu"], plugin, place).environment
    assert found["SGLANG_USE_CPU_ENGINE"] == "1"
    paths = found["PYTHONPATH"].split(os.pathsep)
    assert "/mine" in paths and any("kernel_library" in path for path in paths)
    assert any(path.endswith("replay") for path in paths) is plugin
    assert ("VERICACHE_REPLAY" in found) is plugin
    assert (found.get("SGLANG_PLUGINS") == "none") is not plugin
    assert "SGLANG_USE_CPU_ENGINE" not in ServingServer("m", tmp_path, [], plugin).environment
    with pytest.raises(ValueError, match="no such:thing"):  # before a start, not after it
        ServingServer("m", tmp_path, [], True, "run-lengths.json:no such:thing")


def test_on_cpu():
    assert on_cpu(["--a", "--device", "cpu"]) and on_cpu(["--device=cpu"])
    assert not on_cpu(["--device", "cuda", "cpu"]) and not on_cpu([])
