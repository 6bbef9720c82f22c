"""One server after the other: each measures all cases, and what it found is saved at once."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import rows
from benchmarks.registry import Case
from benchmarks.serving import shapes
from benchmarks.serving.case_prompts import CasePrompts
from benchmarks.serving.figures import Divergence
from benchmarks.serving.measure import measure
from benchmarks.serving.queue import measure_queue
from benchmarks.serving.rescore import MARGIN, rescore
from benchmarks.serving.server import ServingServer
from benchmarks.serving.traffic import CAPACITY_REQUESTS, capacity, measure_traffic

RATES = "rates.json"
CLOSED_SECONDS = 8.0
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
    closed_seconds: float = CLOSED_SECONDS
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

    Attributes:
        path: of the figures.
    """

    def __init__(self, side: Side, options: Options) -> None:
        self.side, self.options, self.folder = side, options, options.folder
        self.path = self.folder / f"run-{len(run_files(self.folder)):02d}-{side.name}.json"
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
            SideError, RuntimeError: the server did not start, or ended.
        """
        side, options = self.side, self.options
        simulated = side.plugin and options.shape is not None
        flags = [*shlex.split(options.flags), *shlex.split(side.flags)]
        record: dict[str, Any] = {
            "side": asdict(side),
            "flags": shlex.join(flags),
            "model": options.model if options.shape else Path(options.model).name,
            "gpu": device_name(),
            "commit": rows.commit(),
            "command": rows.command(),
            "sglang": version("sglang"),
            "date": date.today().isoformat(),
            "cases": {},
            "failed": {},
        }
        log = self.path.with_suffix(".log")
        replay = options.replay if simulated else None
        bar = tqdm(total=self._ticks(cases), desc=f"{side.name}: start", unit="step")
        with (
            bar,
            self._prompts.preparing([case for case in cases if case.arrivals is None]),
            ServingServer(self.model, log, flags, side.plugin, replay) as server,
        ):
            record |= {"start_s": server.start_seconds, "simulated": server.simulated}
            record["first_start"] = not STARTED.exists()
            STARTED.touch()
            self._prompts.wait()
            bar.update()
            for case in cases:

                def tick(what: str, case: Case = case) -> None:
                    bar.set_description(f"{side.name}: {case.name}, {what}")
                    bar.update()

                try:
                    figures = self._case(server, case, tick)
                except Exception as error:  # the others are worth having
                    record["failed"][case.name] = f"{type(error).__name__}: {error}"
                    tqdm.write(f"FAILED {side.name}: {case.name}: {record['failed'][case.name]}")
                else:
                    record["cases"][case.name] = figures
                self.path.write_text(json.dumps(record), encoding="utf-8")
                if not server.alive:
                    raise SideError(f"the server ended, see {log}")
        return record["failed"]

    def _case(self, server: ServingServer, case: Case, tick) -> dict[str, Any]:
        if case.arrivals is not None:
            return self._traffic(server, case, tick)
        return self._decode(server, case, tick)

    def _ticks(self, cases: Sequence[Case]) -> int:
        """About so many steps; what a case skips is not made up."""
        return 1 + sum(3 + self.options.repeats_of(case) for case in cases)

    def _decode(self, server: ServingServer, case: Case, tick) -> dict[str, Any]:
        options = self.options
        prompts, chosen = self._prompts.of(case, server, tick)
        rescores = options.rescores and not self.side.plugin
        repeats, seconds = options.repeats_of(case), options.closed_seconds
        if case.queued:
            figures = measure_queue(server, case, prompts, repeats, tick)
        else:
            figures = measure(server, case, prompts, repeats, seconds, rescores, tick)
        if rescores:
            figures["rescored"] = self._rescore(server, case, prompts, tick)
        server.flush()
        return figures | {"chosen": chosen}

    def _rescore(self, server: ServingServer, case: Case, prompts, tick) -> dict[str, Any]:
        """Of each of our sides the outputs it gave last, by this server."""
        found = {}
        for path, record in read_runs(self.folder):
            figures = record["cases"].get(case.name)
            if not record["side"]["name"].startswith("ours") or figures is None:
                continue
            tick(f"rescoring {record['side']['name']}")
            outputs = figures["outputs"]
            result = rescore(server.url, prompts, outputs)
            found[record["side"]["name"]] = {
                "run": path.name,
                "margin": MARGIN,
                "outputs": len(outputs),
                "tokens": result.tokens,
                "near_ties": result.near_ties,
                "worst": result.worst,
                "mismatches": result.mismatches,
            }
        return found

    def _traffic(self, server: ServingServer, case: Case, tick) -> dict[str, Any]:
        place = self.folder / RATES
        rates = json.loads(place.read_text()) if place.exists() else {}
        if case.name not in rates:
            if self.side.plugin:
                raise SideError(
                    f"{case.name} arrives at a share of the unmodified server's capacity: measure "
                    "a plain side first"
                )
            tick("capacity")
            rates[case.name] = capacity(server, case, self.model, self.options.capacity_requests)
            place.write_text(json.dumps(rates), encoding="utf-8")
        full = rates[case.name]
        repeats, seconds = self.options.repeats_of(case), self.options.traffic_seconds
        return measure_traffic(
            server, case, self.model, case.arrivals * full, seconds, repeats, tick
        ) | {"capacity": full}


def device_name() -> str:
    """Asked in a process of its own: a CUDA context here would take memory from the servers."""
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


def read_runs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in run_files(folder):
        yield path, json.loads(path.read_text(encoding="utf-8"))


def divergence(record: dict[str, Any], other: dict[str, Any], case: str) -> Divergence:
    return Divergence.between(record["cases"][case]["outputs"], other["cases"][case]["outputs"])


def common_flags(model: str) -> str:
    """Of every server on a GPU, by the model."""
    largest = 64 if model.startswith(shapes.PREFIX) else 256
    more = f" {shapes.FLAGS}" if model.startswith(shapes.PREFIX) else " --dtype bfloat16"
    return (
        "--attention-backend flashinfer --sampling-backend pytorch --grammar-backend none "
        "--skip-server-warmup --disable-prefill-cuda-graph --mem-fraction-static 0.85 "
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
