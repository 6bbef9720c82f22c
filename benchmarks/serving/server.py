"""A server on the GPU as a subprocess."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

START_TIMEOUT_S = 280
STOP_TIMEOUT_S = 20
REQUEST_TIMEOUT_S = 900


class ServingServer:
    """``with`` starts it and stops its whole process group.

    Attributes:
        start_seconds: from the command to the first answer.
    """

    def __init__(self, model: str, log: Path, flags: Sequence[str], plugin: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", model),
            *("--port", str(port), "--log-level", "info", *flags),
        ]
        self.environment = dict(os.environ)
        if not plugin:
            self.environment["SGLANG_PLUGINS"] = "none"  # an allow-list: ours is not loaded
        self.start_seconds = 0.0

    def __enter__(self) -> ServingServer:
        started = time.perf_counter()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not self._ready():
            if self._process.poll() is not None or time.perf_counter() - started > START_TIMEOUT_S:
                self.__exit__()
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])
                raise RuntimeError(f"the server did not start:\n{tail}")
            time.sleep(0.5)
        self.start_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(STOP_TIMEOUT_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _ready(self) -> bool:
        try:
            return requests.get(self.url + "/v1/models", timeout=2).status_code == 200
        except requests.RequestException:
            return False

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[dict[str, Any]]:
        """Greedy answers of exactly ``tokens`` tokens, all prompts in one batch."""
        body: dict[str, Any] = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": tokens,
                "ignore_eos": True,
            },
        }
        response = requests.post(self.url + "/generate", json=body, timeout=REQUEST_TIMEOUT_S)
        response.raise_for_status()
        return response.json()

    def flush(self) -> None:
        requests.post(self.url + "/flush_cache?timeout=30", timeout=60).raise_for_status()

    def status(self) -> dict[str, Any] | None:
        """``vericache`` of the server's info; None of an unmodified server."""
        info = requests.get(self.url + "/server_info", timeout=60).json()
        return info["internal_states"][0].get("vericache")
