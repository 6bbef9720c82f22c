"""A CPU server of SGLang as a subprocess: started, waited for, measured, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
from tqdm import tqdm

from sglang_vericache.cpu import engine
from sglang_vericache.demo import DemoError
from sglang_vericache.demo.memory import PeakMemory
from sglang_vericache.demo.port import free_port

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 20
_HOST = "127.0.0.1"
_LOG_LINES = 15


class Server:
    """``with Server(...) as server:`` serves inside the block, and is gone after it.

    Attributes:
        url: where it listens, without a trailing slash.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        log: Path,
        arguments: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            arguments: of the command line, after those that every CPU server here gets.
            variables: of the environment, likewise.
        """
        self.name, self._log = name, log
        port = free_port(_HOST)
        self.url = f"http://{_HOST}:{port}"
        self._command = [
            *(sys.executable, "-m", "sglang.launch_server"),
            *("--model-path", str(model)),
            *("--host", _HOST, "--port", str(port)),
            *("--device", "cpu", "--attention-backend", "torch_native"),
            # Rounding in bfloat16 depends on the batch; float32 leaves no near ties in practice.
            *("--dtype", "float32"),
            *("--log-level", "warning"),
            *arguments,
        ]
        # Where other processes use the cores, threads that spin at a barrier hold up the one that
        # everybody waits for: decoding was several times slower on 2 shared cores.
        quiet = {"OMP_WAIT_POLICY": "PASSIVE"}
        environment = engine.environment(quiet | dict(os.environ))
        # The current directory may be a checkout, no more on a server's path than on ours.
        self._environment = environment | {"PYTHONSAFEPATH": "1"} | dict(variables or {})

    def __enter__(self) -> Server:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, which can be stopped as one
            )
        self._memory = PeakMemory(self._process.pid)
        try:
            self._wait_until_healthy()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ended = self._process.poll() is not None
        self._stop()
        if ended and isinstance(error, Exception):
            raise DemoError(
                f"The {self.name} server ended during a request. {self.log_tail()}"
            ) from error

    @property
    def peak_memory_bytes(self) -> int:
        """Of all its processes together, so far."""
        return self._memory.peak_bytes

    def info(self) -> dict[str, Any]:
        """The scheduler's part of /server_info."""
        response = requests.get(f"{self.url}/server_info", timeout=60)
        response.raise_for_status()
        return response.json()["internal_states"][0]

    def _wait_until_healthy(self) -> None:
        started = time.monotonic()
        # tqdm without a total is a clock; where stderr is no terminal it prints a few lines.
        bar = tqdm(
            desc=f"starting the {self.name} server",
            bar_format="{desc}: {elapsed}",
            mininterval=1.0 if sys.stderr.isatty() else 15.0,
        )
        with bar:
            while not self._is_healthy():
                if self._process.poll() is not None:
                    raise DemoError(
                        f"The {self.name} server ended while starting (exit code "
                        f"{self._process.returncode}). {self.log_tail()}"
                    )
                if time.monotonic() - started > START_TIMEOUT_S:
                    raise DemoError(
                        f"The {self.name} server did not answer within {START_TIMEOUT_S} s. "
                        f"{self.log_tail()}"
                    )
                bar.update()
                time.sleep(1)

    def _is_healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health_generate", timeout=30).ok
        except requests.RequestException:
            return False

    def _stop(self) -> None:
        # To the first process alone, which ends the others: a scheduler that goes by itself looks
        # to it like a crash.
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        # The children of a server that ended by itself may live on.
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._memory.stop()

    def log_tail(self) -> str:
        """The last lines of its log, to follow a sentence that says what went wrong."""
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return f"The end of {self._log}:\n" + "\n".join(f"  {line}" for line in lines)


def reach_directly() -> None:
    """Keep this process's requests to its own servers away from a configured proxy."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, _HOST]))
