"""SGLang's own serving benchmark, unchanged, as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.registry import Case
from benchmarks.serving.server import ServingServer

# Enough for the server to be full for most of the run that finds out what it can take.
CAPACITY_REQUESTS = 1000
TIMEOUT_S = 300
KEPT = (
    *("completed", "duration", "request_throughput", "output_throughput"),
    *("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms"),
)


class TrafficError(RuntimeError):
    """sglang.bench_serving did not come to an end."""


def capacity(server: ServingServer, case: Case, model: str, requests: int) -> float:
    """Requests a second when all of them wait from the beginning."""
    return run(server, case, model, "inf", requests, "capacity")["request_throughput"]


def measure_traffic(
    server: ServingServer,
    case: Case,
    model: str,
    rate: float,
    seconds: float,
    repeats: int,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Poisson arrivals at ``rate`` requests a second; the same requests in every run."""
    count = max(int(rate * seconds), 8)
    runs = []
    for i in range(repeats):
        tick(f"arrivals, run {i + 1}")
        runs.append(run(server, case, model, f"{rate:.3f}", count, f"arrivals{i}"))
    return {"rate": rate, "requests": count, "runs": runs}


def run(
    server: ServingServer, case: Case, model: str, rate: str, count: int, name: str
) -> dict[str, Any]:
    folder = server.log.parent
    results = folder / f"{server.log.stem}-{case.name}-{name}.jsonl"
    results.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"),
        *("--base-url", server.url, "--model", model, "--tokenizer", model),
        *("--dataset-name", "random-ids", "--random-range-ratio", "1"),
        *("--random-input-len", str(case.context), "--random-output-len", str(case.tokens)),
        *("--num-prompts", str(count), "--request-rate", rate, "--seed", "1"),
        *("--flush-cache", "--output-file", str(results)),
    ]
    log = results.with_suffix(".log")
    environment = os.environ | {"SGLANG_PLUGINS": "none"}
    with log.open("wb") as out:
        try:
            code = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                timeout=TIMEOUT_S,
            ).returncode
        except subprocess.TimeoutExpired:
            raise TrafficError(f"{name} took more than {TIMEOUT_S} s, see {log}") from None
    if code or not results.exists():
        raise TrafficError(f"sglang.bench_serving ended with code {code}, see {log}")
    figures = json.loads(results.read_text().splitlines()[-1])
    if figures["completed"] != count:
        raise TrafficError(f"{figures['completed']} of {count} requests were answered, see {log}")
    return {key: figures[key] for key in KEPT}
