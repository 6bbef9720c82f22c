"""sglang.bench_serving in forks of one process, against a stand-in of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.registry import Case
from benchmarks.serving import traffic
from benchmarks.serving.traffic import Traffic, TrafficError

CASE = Case("mix", "", "", 16, 0, None, "serving", tokens=4, arrivals=0.5)
STAND_IN = """
import json, os, sys

print("imported", flush=True)  # among the codes that are read

def cli_main():
    pairs = [word for word in sys.argv[1:] if word != "--flush-cache"]
    told = dict(zip(pairs[::2], pairs[1::2]))
    count = int(told["--num-prompts"])
    print("arrivals at", told["--request-rate"])
    if count == 13:
        sys.exit("unlucky")
    if count == 14:
        import time
        time.sleep(60)
    if count == 15:
        raise ValueError("fifteen")
    times = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
    found = dict.fromkeys(("duration", "output_throughput", *times), 1.0)
    found |= {"completed": min(count, 99), "request_throughput": float(os.getppid())}
    with open(told["--output-file"], "a") as out:
        out.write(json.dumps(found) + "\\n")
"""


@pytest.fixture
def ready(tmp_path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    (tmp_path / "sglang" / "bench_serving.py").write_text(STAND_IN)
    environment = dict(os.environ) | {"PYTHONPATH": str(tmp_path)}
    server = SimpleNamespace(
        log=tmp_path / "run-00-plain.log", environment=environment, url="http://nowhere"
    )
    with Traffic(server, "model", True) as made:
        yield made


def test_runs(ready):
    """Catches a run that costs another import, and figures of an earlier one."""
    rate = ready.capacity(CASE, 20)
    ticks = []
    found = ready.measure(CASE, 10.0, 2.0, 3, ticks.append)
    assert ticks == ["arrivals"] * 3
    assert found["requests"] == 20 and found["rate"] == 10.0 and len(found["runs"]) == 3
    # All are children of one process.
    assert {run["request_throughput"] for run in found["runs"]} == {rate}
    log = Path(ready.log.parent / "run-00-plain-mix-arrivals1.log").read_text()
    assert "arrivals at 10.000" in log


@pytest.mark.parametrize("count, says", [(13, "code 1"), (15, "code 1"), (100, "99 of 100")])
def test_failures(ready, count, says):
    """Catches a run that failed and passes for one of nothing, and one that ends those after it."""
    with pytest.raises(TrafficError, match=rf"(?s){says}.*see .*-mix-x\.log"):
        ready.run(CASE, "inf", count, "x")
    assert "request_throughput" in ready.run(CASE, "inf", 20, "y")


def test_out_of_time(ready, monkeypatch):
    """Catches a run that holds the device until the lease ends."""
    ready.run(CASE, "inf", 20, "y")
    monkeypatch.setattr(traffic, "TIMEOUT_S", 0.3)
    with pytest.raises(TrafficError, match="more than"):
        ready.run(CASE, "inf", 14, "x")
    with pytest.raises(TrafficError, match="any more"):
        ready.run(CASE, "inf", 20, "x")


def test_not_wanted():
    """Catches an import that no case needs."""
    server = SimpleNamespace(log=Path("/nowhere/run.log"))
    with Traffic(server, "model", False):
        pass
