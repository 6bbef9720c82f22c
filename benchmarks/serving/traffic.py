"""SGLang's own serving benchmark, unchanged, as its users run it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
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
# To import sglang.bench_serving takes as long as a run of it. So one process imports it while the
# server starts, and each run is a fork of that: with the program and the arguments of
# ``python -m sglang.bench_serving``.
RUNNER = """
import json, os, sys, traceback
from sglang.bench_serving import cli_main

for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if not child:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = ["bench_serving", *arguments]
        code = 1
        try:
            cli_main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class TrafficError(RuntimeError):
    """sglang.bench_serving did not come to an end."""


class Traffic:
    """``with`` keeps it ready.

    Args:
        server: that gets the requests.
        model: directory with a tokenizer.
        wanted: False: nothing will run.
    """

    def __init__(self, server: ServingServer, model: str, wanted: bool) -> None:
        self.server, self.model, self.wanted = server, model, wanted
        self.log = server.log.with_name(f"{server.log.stem}-bench_serving.log")

    def __enter__(self) -> Traffic:
        if self.wanted:
            with self.log.open("wb") as log:
                self._runner = subprocess.Popen(
                    [sys.executable, "-c", RUNNER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,  # or `select` would not see what lies in a buffer
                    cwd=self.log.parent,
                    env=self.server.environment | {"SGLANG_PLUGINS": "none"},
                    start_new_session=True,
                )
        return self

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            self._end()

    def _end(self) -> None:
        try:
            os.killpg(self._runner.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._runner.wait()

    def capacity(self, case: Case, requests: int) -> float:
        """Requests a second when all of them wait from the beginning."""
        return self.run(case, "inf", requests, "capacity")["request_throughput"]

    def measure(
        self,
        case: Case,
        rate: float,
        seconds: float,
        repeats: int,
        tick: Callable[[str], None] = lambda what: None,
    ) -> dict[str, Any]:
        """Poisson arrivals at ``rate`` requests a second; the same requests in every run."""
        count = max(int(rate * seconds), 8)
        runs = []
        for i in range(repeats):
            tick("arrivals")
            runs.append(self.run(case, f"{rate:.3f}", count, f"arrivals{i}"))
        return {"rate": rate, "requests": count, "runs": runs}

    def run(self, case: Case, rate: str, count: int, name: str) -> dict[str, Any]:
        results = self.log.with_name(f"{self.server.log.stem}-{case.name}-{name}.jsonl")
        results.unlink(missing_ok=True)
        arguments = [
            *("--backend", "sglang", "--base-url", self.server.url),
            *("--model", self.model, "--tokenizer", self.model),
            *("--dataset-name", "random-ids", "--random-range-ratio", "1"),
            *("--random-input-len", str(case.context), "--random-output-len", str(case.tokens)),
            *("--num-prompts", str(count), "--request-rate", rate, "--seed", "1"),
            *("--flush-cache", "--output-file", str(results)),
        ]
        log = results.with_suffix(".log")
        code = self._code_of(arguments, str(log), name)
        if code or not results.exists():
            raise TrafficError(f"sglang.bench_serving ended with code {code}, see {log}")
        figures = json.loads(results.read_text().splitlines()[-1])
        if figures["completed"] != count:
            raise TrafficError(
                f"{figures['completed']} of {count} requests were answered, see {log}"
            )
        return {key: figures[key] for key in KEPT}

    def _code_of(self, arguments: Sequence[str], log: str, name: str) -> int:
        told, heard = self._runner.stdin, self._runner.stdout
        assert told is not None and heard is not None
        try:
            told.write(json.dumps([arguments, log]).encode() + b"\n")
            told.flush()
        except BrokenPipeError:
            pass  # its output has ended as well
        line = b"-"
        while not line.startswith(b"ended "):
            if not select.select([heard], [], [], TIMEOUT_S)[0]:
                self._end()
                raise TrafficError(f"{name} took more than {TIMEOUT_S} s, see {log}")
            line = heard.readline()
            if not line:
                raise TrafficError(f"nothing runs sglang.bench_serving any more, see {self.log}")
        return int(line.split()[1])
