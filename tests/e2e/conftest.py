"""Models and reference answers, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from breadth import MIN_CONTEXT, breadth_phases
from cases import Answers, Call, Phase
from depth import ChatPrompts, depth_phases
from rotation_load import together
from servers import server
from tiny_model import make_tiny_model

from sglang_vericache.demo.model import prepare_model

CACHE = Path(os.environ.get("VERICACHE_CACHE", ".cache")).resolve()
TINY_FLAGS = ("--max-total-tokens", "20000", "--chunked-prefill-size", "256")
REAL_FLAGS = ("--max-total-tokens", "20000")
# Short contexts draft too, so that a tiny model exercises everything.
DRAFT_FLAGS = ("--enable-vericache", "--vericache-min-context", str(MIN_CONTEXT))

Phases = Callable[[Answers], Iterable[Phase]]


@dataclass(frozen=True)
class Reference:
    """The unmodified server's answers to some phases."""

    model: Path
    flags: tuple[str, ...]
    phases: Phases
    answers: Answers

    @property
    def calls(self) -> list[Call]:
        return [call for phase in self.phases(self.answers) for call in phase.all_calls]


@pytest.fixture(scope="session")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def real_model() -> Path:
    return prepare_model(CACHE)


@pytest.fixture(scope="session")
def tiny_model(real_model) -> Path:
    return make_tiny_model(CACHE / "tiny-random", real_model)


def make_reference(model: Path, flags, phases: Phases, log: Path) -> Reference:
    """Runs the unmodified server."""
    answers: Answers = {}
    with server(model, log, flags, plugin=False, with_gaps=True) as client:
        client.run(phases, answers)
    return Reference(model, tuple(flags), phases, answers)


@pytest.fixture(scope="session")
def tiny_reference(tiny_model, logs) -> Reference:
    return make_reference(tiny_model, TINY_FLAGS, breadth_phases, logs / "tiny-reference.log")


@pytest.fixture(scope="session")
def offload_reference(tiny_model, logs) -> Reference:
    return make_reference(tiny_model, TINY_FLAGS, together, logs / "offload-reference.log")


@pytest.fixture(scope="session")
def real_reference(real_model, logs) -> Reference:
    prompts = ChatPrompts(str(real_model))
    return make_reference(
        real_model,
        REAL_FLAGS,
        lambda base: depth_phases(base, prompts),
        logs / "real-reference.log",
    )
