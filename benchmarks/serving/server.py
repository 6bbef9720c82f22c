"""A server under measurement as a subprocess."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import requests

from benchmarks.replay.vericache_replay import FOLDER as REPLAY_FOLDER
from benchmarks.replay.vericache_replay import STATUS_KEY, VARIABLE, Recording
from sglang_vericache.demo.port import free_port

START_TIMEOUT_S = 600  # a host tier of 106 GB is pinned for minutes
# SGLang looks every five seconds whether it was told to end, and nothing of a server that was
# measured is worth waiting for.
GRACE_S, STOP_TIMEOUT_S = 1, 20
REQUEST_TIMEOUT_S, SETTLE_TIMEOUT_S = 900, 60
FIRST_ID = 256  # any token
# Of the plugin's status.
PACE = ("horizons", "rounds_in_parts", "plain_together", "rounds_ahead")
# How the last line of a Python traceback begins; those of requests are from a server's front, which
# asks itself something before it listens.
_ERROR = re.compile(r"^(?!requests\.)[\w.]*(?:Error|Exception|Interrupt)\b.*$", re.MULTILINE)
_CRASH = re.compile(r"Subprocess .* crashed with exit code -?\d+")


class ServingServer:
    """``with`` starts it and stops its whole process group.

    Args:
        plugin: False keeps ours from loading at all.
        replay: FILE:CONFIG:MODE of run lengths that replace real acceptance.

    Attributes:
        start_seconds: from the command to the first answer.
        simulated: what the run lengths are from, by the server's own account; None: accepted for
            real.
    """

    def __init__(
        self,
        model: str,
        log: Path,
        flags: Sequence[str],
        plugin: bool,
        replay: str | None = None,
    ) -> None:
        port = free_port("127.0.0.1")
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", model),
            *("--port", str(port), "--log-level", "info", *flags),
        ]
        self.environment = dict(os.environ)
        # Only what this server was told may replace acceptance, not a variable left over.
        self.environment.pop(VARIABLE, None)
        if on_cpu(flags):
            from sglang_vericache.cpu import engine  # here, because it brings torch along

            self.environment = engine.environment(self.environment)
        if not plugin:
            self.environment["SGLANG_PLUGINS"] = "none"  # an allow-list: ours is not loaded
        elif replay is not None:
            paths = [str(REPLAY_FOLDER), *filter(None, [self.environment.get("PYTHONPATH")])]
            self.environment["PYTHONPATH"] = os.pathsep.join(paths)
            self.environment[VARIABLE] = replay
        self.plugin = plugin
        self._wanted = Recording.load(replay).label if plugin and replay is not None else None
        self.start_seconds = 0.0
        self.simulated: str | None = None

    def __enter__(self) -> ServingServer:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                # Python puts the current directory on its path, and a checkout holds a folder of
                # the name of a package that SGLang needs.
                cwd=self.log.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_for_answer()
            self._check_acceptance()
        except BaseException:  # an interruption too: no server outlives this command
            self.__exit__()
            raise
        return self

    def _wait_for_answer(self) -> None:
        started = time.perf_counter()
        while not self._ready():
            if self._process.poll() is not None or time.perf_counter() - started > START_TIMEOUT_S:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])
                raise RuntimeError(f"the server did not start, see {self.log}:\n{tail}")
            time.sleep(0.5)
        self.start_seconds = time.perf_counter() - started

    def _check_acceptance(self) -> None:
        """A row must say how its drafts were accepted: the server is asked, not the command."""
        status = self.status()
        if (status is not None) != self.plugin:
            raise RuntimeError(f"the plugin is {'not ' * self.plugin}active, see {self.log}")
        self.simulated = (status or {}).get(STATUS_KEY)
        if self.simulated != self._wanted:
            is_, wanted = (label or "real" for label in (self.simulated, self._wanted))
            raise RuntimeError(f"the server's acceptance is {is_}, not {wanted}")

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(STOP_TIMEOUT_S)

    @property
    def started(self) -> bool:
        """Whether there is a process, whatever it does."""
        return hasattr(self, "_process")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def recovers(self) -> bool:
        """After a failed case: whether the server serves the next, without anything of this one.

        It is asked for a token, because its front may live on for a while where its scheduler died.
        """
        try:
            self.abort()
            self.settle()
            self.flush()
        except requests.RequestException:
            return False
        return self.alive

    def last_words(self) -> str:
        """The last exception in its log, how its scheduler ended, and where the log lies."""
        text = self.log.read_text(errors="replace")
        said = [found[-1].strip() for kind in (_ERROR, _CRASH) if (found := kind.findall(text))]
        return "; ".join([*said, f"see {self.log}"])

    def _ready(self) -> bool:
        try:
            return requests.get(self.url + "/v1/models", timeout=2).status_code == 200
        except requests.RequestException:
            return False

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, timeout: float = REQUEST_TIMEOUT_S
    ) -> list[list[int]]:
        """Greedy answers of exactly ``tokens`` tokens, all prompts in one batch."""
        body: dict[str, Any] = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": tokens,
                "ignore_eos": True,
            },
        }
        response = requests.post(self.url + "/generate", json=body, timeout=timeout)
        response.raise_for_status()
        return [answer["output_ids"] for answer in response.json()]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        """Read all prompts into the cache; the seconds it took."""
        started = time.perf_counter()
        self.generate(prompts, 1)
        return time.perf_counter() - started

    def prefill_in_turn(self, prompts: Sequence[Sequence[int]]) -> float:
        """`prefill`, one prompt after the other: together they need not fit."""
        return sum(self.prefill([prompt]) for prompt in prompts)

    def flush(self) -> None:
        requests.post(self.url + "/flush_cache?timeout=30", timeout=60).raise_for_status()

    def abort(self) -> None:
        """Give up whatever runs."""
        requests.post(self.url + "/abort_request", json={"abort_all": True}, timeout=60)

    def settle(self) -> None:
        """Wait until requests that were given up have left."""
        self.generate([[FIRST_ID]], 1, SETTLE_TIMEOUT_S)

    def status(self) -> dict[str, Any] | None:
        """``vericache`` of the server's info; None of an unmodified server."""
        info = requests.get(self.url + "/server_info", timeout=60).json()
        return info["internal_states"][0].get("vericache")

    def pace(self) -> dict[str, Any]:
        """What the plugin's choice of horizons rests on and has done since the server's start."""
        status = self.status() or {}
        return {name: status[name] for name in PACE if name in status}

    def phases(self) -> dict[str, float]:
        """Seconds that the plugin has spent in each of its phases so far; none without it."""
        status = self.status() if self.plugin else None
        return dict(status["phase_seconds"]) if status else {}


def on_cpu(flags: Sequence[str]) -> bool:
    return ("--device", "cpu") in pairwise(flags) or "--device=cpu" in flags
