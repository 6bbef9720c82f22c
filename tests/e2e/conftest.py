"""Models and reference answers, made once for all processes that run tests."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from breadth import BY_RATIO, MIN_CONTEXT, breadth_phases
from cases import Answers, Call, Phase
from depth import ChatPrompts, depth_phases
from filelock import FileLock
from rotation_load import together
from servers import server
from short_phases import flag_off_phases, growth_phases, interruption_phases, mutation_phases
from tiny_model import make_tiny_model

from sglang_vericache.demo.model import prepare_model

CACHE = Path(os.environ.get("VERICACHE_CACHE", ".cache")).resolve()
TINY_FLAGS = ("--max-total-tokens", "20000", "--chunked-prefill-size", "256")
REAL_FLAGS = ("--max-total-tokens", "20000")
# Short contexts draft too, so that a tiny model exercises everything.
DRAFT_FLAGS = ("--enable-vericache", "--vericache-min-context", str(MIN_CONTEXT), *BY_RATIO)

Phases = Callable[[Answers], Iterable[Phase]]
Made = TypeVar("Made")

# What the unmodified server is asked with the tiny model: all of it in one go, because starting a
# server takes as long as most of these.
TINY_PHASES: dict[str, Phases] = {
    "breadth": breadth_phases,
    "offload": together,
    "interruptions": interruption_phases,
    "mutations": mutation_phases,
    "flag off": flag_off_phases,
    "growth": growth_phases,
}


@dataclass(frozen=True)
class Reference:
    """The unmodified server's answers to some phases.

    Attributes:
        info: what its info endpoint says, before anything is asked.
    """

    model: Path
    flags: tuple[str, ...]
    phases: Phases
    answers: Answers
    info: dict[str, Any]

    @property
    def calls(self) -> list[Call]:
        return [call for phase in self.phases(self.answers) for call in phase.all_calls]


@pytest.fixture(scope="session")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("servers")


class Shared:
    """What one of the processes that run tests makes, for all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        path = self.folder / f"{name}.pickle"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                made = pickle.dumps(make())
                path.write_bytes(made)
            return pickle.loads(path.read_bytes())


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Shared:
    own = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its processes a folder in that of the run.
    return Shared(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)


@pytest.fixture(scope="session")
def real_model(shared) -> Path:
    return shared.once("real-model", lambda: prepare_model(CACHE))


@pytest.fixture(scope="session")
def tiny_model(shared, real_model) -> Path:
    return shared.once("tiny-model", lambda: make_tiny_model(CACHE / "tiny-random", real_model))


def make_reference(model: Path, flags: tuple[str, ...], phases: Phases, log: Path) -> Reference:
    """Of a test that wants flags of its own."""
    answers, info = ask_unmodified(model, flags, {"only": phases}, log)
    return Reference(model, flags, phases, answers["only"], info)


def ask_unmodified(
    model: Path, flags: tuple[str, ...], phases: dict[str, Phases], log: Path
) -> tuple[dict[str, Answers], dict[str, Any]]:
    """Answers by the name of the phases, and what the info endpoint said."""
    answers: dict[str, Answers] = {name: {} for name in phases}
    with server(model, log, flags, plugin=False, with_gaps=True) as client:
        info = client.info()
        for name, asked in phases.items():
            client.flush()
            client.run(asked, answers[name])
    return answers, info


@pytest.fixture(scope="session")
def tiny_references(shared, tiny_model, logs) -> dict[str, Reference]:
    answers, info = shared.once(
        "tiny-references",
        lambda: ask_unmodified(tiny_model, TINY_FLAGS, TINY_PHASES, logs / "tiny-reference.log"),
    )
    return {
        name: Reference(tiny_model, TINY_FLAGS, phases, answers[name], info)
        for name, phases in TINY_PHASES.items()
    }


@pytest.fixture(scope="session")
def tiny_reference(tiny_references) -> Reference:
    return tiny_references["breadth"]


@pytest.fixture(scope="session")
def offload_reference(tiny_references) -> Reference:
    return tiny_references["offload"]


@pytest.fixture(scope="session")
def real_reference(shared, real_model, logs) -> Reference:
    prompts = ChatPrompts(str(real_model))
    phases = {"depth": lambda base: depth_phases(base, prompts)}
    answers, info = shared.once(
        "real-references",
        lambda: ask_unmodified(real_model, REAL_FLAGS, phases, logs / "real-reference.log"),
    )
    return Reference(real_model, REAL_FLAGS, phases["depth"], answers["depth"], info)
