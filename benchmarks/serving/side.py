"""One server after the other: each measures all cases, and what it found is saved at once."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.registry import Case
from benchmarks.serving import shapes
from benchmarks.serving.case_prompts import (
    CHOSEN,
    CasePrompts,
    NotChosenError,
    choice_for,
    missing,
    model_name,
)
from benchmarks.serving.measure import measure
from benchmarks.serving.progress import SERVER, Progress
from benchmarks.serving.queue import measure_queue
from benchmarks.serving.rescore import (
    ANOTHER,
    SAME_START,
    earlier_own,
    is_ours,
    rescore,
    unscored,
)
from benchmarks.serving.selection import read_selections
from benchmarks.serving.server import ServingServer, on_cpu
from benchmarks.serving.traffic import CAPACITY_REQUESTS, Traffic
from benchmarks.serving.turns import Turns

RATES = "rates.json"
# The first server on a machine compiles kernels that the later ones find.
STARTED = Path(tempfile.gettempdir()) / "vericache-bench-started"


class SideError(RuntimeError):
    """A side cannot be measured; the message says what is missing."""


@dataclass(frozen=True)
class Side:
    """A server of the comparison.

    Attributes:
        name: "plain" or "ours", with a number where there are several.
        flags: beside those of both.
    """

    name: str
    flags: str

    @property
    def plugin(self) -> bool:
        return self.name.startswith("ours")


@dataclass(frozen=True)
class Options:
    """What all sides have in common.

    Attributes:
        folder: for logs, prompts and figures.
        model: directory of a checkpoint or ``shape:NAME``.
        flags: of every server.
        replay: run lengths for models without weights.
        repeats: None: the case's own.
        closed_seconds, select_seconds, traffic_seconds: lengths of those parts.
        capacity_requests: that wait at once to find out what a server can take.
        rescores: plain sides rescore what ours has answered so far.
    """

    folder: Path
    model: str
    flags: str
    replay: str
    repeats: int | None = None
    closed_seconds: float = 0.0
    select_seconds: float = 90.0
    traffic_seconds: float = 15.0
    capacity_requests: int = CAPACITY_REQUESTS
    rescores: bool = False

    @property
    def shape(self) -> str | None:
        prefixed = self.model.startswith(shapes.PREFIX)
        return self.model.removeprefix(shapes.PREFIX) if prefixed else None

    def repeats_of(self, case: Case) -> int:
        return case.repeats if self.repeats is None else self.repeats


class SideRun:
    """Measures cases on one side.

    Args:
        number: of the run; None for the next one in the folder.
        turns: with the sides whose servers are up at the same time; None where there are none.

    Attributes:
        path: of the figures.
        stopped: no further case is to be measured.
    """

    def __init__(
        self,
        side: Side,
        options: Options,
        number: int | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.side, self.options, self.folder = side, options, options.folder
        number = next_number(self.folder) if number is None else number
        self.path = self.folder / f"run-{number:02d}-{side.name}.json"
        self._turns = turns
        self._server: ServingServer | None = None
        self.stopped = False
        self.model = options.model
        if options.shape is not None:
            folder = self.folder / f"shape-{options.shape}"
            self.model = str(shapes.write_shape(options.shape, folder))
        self._prompts = CasePrompts(
            self.folder, self.model, options.shape, not side.plugin, options.select_seconds
        )

    def measure(self, cases: Sequence[Case]) -> dict[str, str]:
        """Start the server, measure, stop it.

        Returns:
            Why cases failed, by name; the figures of the others lie in ``path``.

        Raises:
            RuntimeError: the server did not start.
        """
        side, options = self.side, self.options
        simulated = side.plugin and options.shape is not None
        flags = [*shlex.split(options.flags), *shlex.split(side.flags)]
        record: dict[str, Any] = {
            "side": asdict(side),
            "flags": shlex.join(flags),
            "model": model_name(options.model),
            "gpu": "cpu" if on_cpu(flags) else device_name(),
            "machine": platform.node(),
            "commit": rows.commit(),
            "command": rows.command(),
            "sglang": version("sglang"),
            "date": date.today().isoformat(),
            "together": self._turns is not None,
            "cases": {},
            "failed": {},
        }
        log = self.path.with_suffix(".log")
        replay = options.replay if simulated else None
        self._server = server = ServingServer(self.model, log, flags, side.plugin, replay)
        decoded = [case for case in cases if case.arrivals is None]
        try:
            with (
                Progress(side.name, len(cases)) as progress,
                self._prompts.preparing(decoded),
                Traffic(server, self.model, len(decoded) < len(cases)) as traffic,
            ):
                record["spent_s"] = progress.spent
                progress.begin(SERVER, "start")
                with server:
                    record |= {"start_s": server.start_seconds, "simulated": server.simulated}
                    record["first_start"] = not STARTED.exists()
                    STARTED.touch()
                    progress.begin(SERVER, "prompts")
                    self._prompts.wait()
                    for case in cases:
                        with self._turn(progress):
                            if server.alive and not self.stopped:
                                self._attempt(server, traffic, case, record, progress)
                            else:
                                record["failed"][case.name] = "not measured: the server had ended"
                        progress.case_done()
                    progress.begin(SERVER, "stop")
        finally:
            # Also of a run that was interrupted, with the cases that were done by then.
            if record["cases"] or record["failed"]:
                self._save(record)
        return record["failed"]

    def _turn(self, progress: Progress) -> AbstractContextManager[None]:
        if self._turns is None:
            return nullcontext()
        progress.begin(SERVER, "waiting")
        return self._turns.turn(self.side.name)

    def stop(self) -> None:
        """From another thread: what is being measured fails."""
        if self._server is not None and self._server.started:
            self._server.stop()

    def _attempt(
        self,
        server: ServingServer,
        traffic: Traffic,
        case: Case,
        record: dict[str, Any],
        progress: Progress,
    ) -> None:
        """Its figures or its failure go into ``record``: the other cases are worth having."""

        def tick(what: str) -> None:
            progress.begin(case.name, what)

        try:
            if case.arrivals is not None:
                figures = self._traffic(traffic, case, tick)
            else:
                figures = self._decode(server, case, tick)
            if self.side.plugin:  # to understand later what it chose
                figures["pace"] = server.pace()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            if isinstance(error, NotChosenError):
                why += _why_nobody_chose(self.folder, case)
            tick("recovery")
            if not server.recovers():
                server.stop()
                why = f"the server ended or answers no more ({why}): {server.last_words()}"
            record["failed"][case.name] = why
            progress.say(f"FAILED {self.side.name}: {case.name}: {why}")
        else:
            record["cases"][case.name] = figures
        self._save(record)

    def _save(self, record: dict[str, Any]) -> None:
        """Whole or not at all: a command that is killed leaves what was there before."""
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(record), encoding="utf-8")
        fresh.replace(self.path)

    def _decode(self, server: ServingServer, case: Case, tick) -> dict[str, Any]:
        options = self.options
        tick("prompts")
        prompts, chosen = self._prompts.of(case, server, tick)
        rescores = options.rescores and not self.side.plugin
        repeats, seconds = options.repeats_of(case), options.closed_seconds
        if case.queued:
            figures = measure_queue(server, case, prompts, repeats, tick)
        else:
            figures = measure(server, case, prompts, repeats, seconds, rescores, tick)
        if rescores:
            records, figures["rescored"] = dict(read_runs(self.folder)), {}
            like = figures | {"chosen": chosen}
            for name, outputs in unscored(records, case.name, like).items():
                tick("rescoring")
                found = rescore(server.url, prompts, outputs)
                figures["rescored"][name] = found.describe(len(outputs))
            if figures["rescored"]:
                tick("rescoring its own")
                other = earlier_own(records, case.name, self.side.flags, like)
                outputs = other or figures["outputs"]
                found = rescore(server.url, prompts, outputs)
                of = SAME_START if other is None else ANOTHER
                figures["own_rescored"] = found.describe(len(outputs)) | {"of": of}
        tick("flush")
        server.flush()
        return figures | {"chosen": chosen}

    def _traffic(self, traffic: Traffic, case: Case, tick) -> dict[str, Any]:
        place = self.folder / RATES
        rates = json.loads(place.read_text()) if place.exists() else {}
        if case.name not in rates:
            if self.side.plugin:
                raise SideError(no_capacity(case))
            tick("capacity")
            rates[case.name] = traffic.capacity(case, self.options.capacity_requests)
            place.write_text(json.dumps(rates), encoding="utf-8")
        full = rates[case.name]
        repeats, seconds = self.options.repeats_of(case), self.options.traffic_seconds
        figures = traffic.measure(case, case.arrivals * full, seconds, repeats, tick)
        return figures | {"capacity": full}


def no_capacity(case: Case) -> str:
    return (
        f"{case.name} arrives at a share of the unmodified server's capacity: measure a plain side "
        "first"
    )


def _why_nobody_chose(folder: Path, case: Case) -> str:
    """What the last plain side that tried says of it, to go behind that error's message."""
    failed = [
        f" ({record['side']['name']} failed: {record['failed'][case.name]})"
        for _, record in read_runs(folder)
        if case.name in record["failed"] and not is_ours(record)
    ]
    return failed[-1] if failed else ""


def check_order(sides: Sequence[Side], cases: Sequence[Case], options: Options) -> None:
    """Before a server starts for nothing.

    Raises:
        SideError: ours comes first, and would lack what only a plain side finds out.
        SelectionError: the prompts in the folder are no choice for this model.
    """
    choices = {}
    if options.shape is None:
        choices = read_selections(options.folder / CHOSEN, model_name(options.model))
    if not sides[0].plugin:
        return
    place = options.folder / RATES
    rates = json.loads(place.read_text()) if place.exists() else {}
    for case in cases:
        if case.arrivals is not None and case.name not in rates:
            raise SideError(no_capacity(case))
        if case.arrivals is None and options.shape is None and choice_for(case, choices) is None:
            raise SideError(missing(case))


@cache
def device_name() -> str:
    """As torch calls it, which takes seconds to import, so its driver is asked first."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        named = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        return named.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    # In a process of its own: a CUDA context here would take memory from the servers.
    code = (
        "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    )
    command = [sys.executable, "-c", code]
    # Away from the current directory, which may be a checkout.
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.home())
    return done.stdout.split("\n")[0]


def run_files(folder: Path) -> list[Path]:
    """In the order of their beginning."""
    return sorted(folder.glob("run-*.json"))


def next_number(folder: Path) -> int:
    return 1 + max((int(path.name.split("-")[1]) for path in run_files(folder)), default=-1)


def read_runs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in run_files(folder):
        yield path, json.loads(path.read_text(encoding="utf-8"))


def common_flags(model: str) -> str:
    """Of every server on a GPU, by the model."""
    largest = 64 if model.startswith(shapes.PREFIX) else 256
    more = f" {shapes.FLAGS}" if model.startswith(shapes.PREFIX) else " --dtype bfloat16"
    return (
        "--attention-backend flashinfer --sampling-backend pytorch --grammar-backend none "
        "--skip-server-warmup --mem-fraction-static 0.85 "
        f"--cuda-graph-max-bs-decode {largest}{more}"
    )


def default_model(cases: Sequence[Case]) -> str | None:
    """Of registered cases; None where the user must say it.

    Raises:
        SideError: the cases are of several models, which one server cannot serve.
    """
    models = {case.model for case in cases} - {""}
    if len(models) > 1:
        raise SideError(f"one server has one model, these cases have {', '.join(sorted(models))}")
    model = models.pop() if models else None
    if model is not None and model.startswith(shapes.PREFIX):
        return model
    if model is None:
        return None
    from sglang_vericache.demo.model import default_cache_dir, prepare_model

    return str(prepare_model(default_cache_dir()))
