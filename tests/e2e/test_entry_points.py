"""Every way to start SGLang knows the flag."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from breadth import tokens

from sglang_vericache.cpu import engine
from sglang_vericache.demo.port import free_port

pytestmark = pytest.mark.e2e

PROGRAM = """
import json, sys
import sglang

if __name__ == "__main__":
    with_flag = {"enable_vericache": True, "vericache_min_context": 64, "vericache_horizon": 8}
    engine = sglang.Engine(
        model_path=sys.argv[1], device="cpu", dtype="float32", max_total_tokens=8000,
        attention_backend="torch_native", **(with_flag if sys.argv[2] == "on" else {}),
    )
    ids = json.loads(sys.argv[3])
    out = engine.generate(
        input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    )
    print("RESULT", json.dumps([out["output_ids"], out["meta_info"].get("vericache")]))
    engine.shutdown()
"""


def run_engine(program, model, flag, env):
    done = subprocess.run(
        [sys.executable, "-P", str(program), str(model), flag, json.dumps(tokens(66, 500))],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return (json.loads(lines[0][7:]) if lines else None), done.stderr


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_engine(program, tiny_model):
    """The same tokens through sgl.Engine, on and off."""
    env = engine.environment(dict(os.environ))
    (off, nothing), _ = run_engine(program, tiny_model, "off", env)
    (on, info), _ = run_engine(program, tiny_model, "on", env)
    assert on == off and len(on) == 40
    assert nothing is None and info["accepted"] > 0


def test_engine_without_the_cpu_engine(program, tiny_model):
    """A user's process cannot be restarted: it gets the line to type."""
    env = {k: v for k, v in os.environ.items() if k not in (engine.SWITCH, "PYTHONPATH")}
    result, errors = run_engine(program, tiny_model, "on", env)
    assert result is None
    assert f"{engine.SWITCH}=1 PYTHONPATH=" in errors and "python" in errors


@pytest.mark.parametrize("command", ["launch_server", "serve"])
def test_bare_command_restarts_itself(command, tiny_model, tmp_path):
    """Typed without the CPU engine's variables, the command sets them and serves."""
    import time

    import requests

    start = {
        "launch_server": [sys.executable, "-P", "-m", "sglang.launch_server"],
        "serve": [os.path.join(os.path.dirname(sys.executable), "sglang"), "serve"],
    }[command]
    env = {k: v for k, v in os.environ.items() if k not in (engine.SWITCH, "PYTHONPATH")}
    port = free_port("127.0.0.1")
    flags = ["--model-path", str(tiny_model), "--port", str(port), "--dtype", "float32"]
    flags += ["--max-total-tokens", "8000", "--enable-vericache", "--device", "cpu"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*start, *flags], env=env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if requests.get(f"http://127.0.0.1:{port}/health_generate", timeout=20).ok:
                    break
            except requests.ConnectionError:
                time.sleep(1)
        body = {
            "input_ids": tokens(66, 700),
            "sampling_params": {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True},
        }
        reply = requests.post(f"http://127.0.0.1:{port}/generate", json=body, timeout=120).json()
        assert reply["meta_info"]["vericache"]["rounds"] > 0
        assert "restarting with SGLang's CPU engine" in log.read_text()
    finally:
        os.killpg(process.pid, 9)
        process.wait()
