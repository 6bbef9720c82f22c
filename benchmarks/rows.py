"""One row format for every measurement, with where it came from."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        case: which set-up was measured.
        baseline: the same metric of the unmodified SGLang in the same run on the same machine,
            None where it has none.
        gpu: name of the device, or "cpu".
        simulated_acceptance: where imposed run lengths came from, None when drafts were checked
            for real.
        mismatches: outputs that differ from the baseline's; near_ties are not among them.
    """

    case: str
    metric: str
    value: float
    unit: str
    model: str
    flags: str
    baseline: float | None = None
    simulated_acceptance: str | None = None
    tokens_per_round: float | None = None
    mismatches: int | None = None
    near_ties: int | None = None
    note: str = ""
    gpu: str = ""
    command: str = ""
    commit: str = ""
    sglang: str = ""
    date: str = ""


def append(file: str, row: Row) -> None:
    """Add ``row`` to results/``file``; the machine, command, commit and date that it lacks are
    those of this run.

    Raises:
        ValueError: the commit is unknown.
    """
    at = row.commit or require_commit()
    filled = asdict(row) | {
        "gpu": row.gpu or device_name(),
        "command": row.command or command(),
        "commit": at,
        "sglang": row.sglang or version("sglang"),
        "date": row.date or date.today().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / file).open("a", encoding="utf-8") as out:
        out.write(json.dumps(filled) + "\n")


def read(file: str) -> list[Row]:
    """The rows of results/``file`` in order; none where it does not exist."""
    path = RESULTS / file
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def command() -> str:
    """What was typed; of a measure that the runner started, what the runner was told."""
    typed = shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    return os.environ.get("VERICACHE_COMMAND", typed)


def require_commit() -> str:
    """Raises:
    ValueError: the commit is unknown.
    """
    at = commit()
    if at.startswith("unknown"):
        raise ValueError("a row without a commit says nothing: set VERICACHE_COMMIT")
    return at


def device_name() -> str:
    import torch  # here, because tables are made without it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def commit() -> str:
    """Short hash of the checkout, with a plus when the working tree differs from it.

    Where the files came without git, VERICACHE_COMMIT says it.
    """
    if "VERICACHE_COMMIT" in os.environ:
        return os.environ["VERICACHE_COMMIT"]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")
