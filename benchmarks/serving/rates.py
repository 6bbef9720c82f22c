"""Which rate stands for a case, and those that stand beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.client import WARM_S
from benchmarks.serving.figures import WARM_TOKENS
from benchmarks.serving.measure import median_run

Record = dict[str, Any]


@dataclass(frozen=True)
class Basis:
    """A way to say how fast a case went.

    Attributes:
        unit: what one of its rates is of.
        rates: of one server's figures, in tokens a second; None among them where one is undefined.
        told: what was timed, for a row's note.
    """

    unit: str
    rates: Callable[[Record], Sequence[float | None]]
    told: Callable[[Record], str]

    def among(self, figures: Sequence[Record]) -> list[float]:
        """Of those of one side that have it: a start that only rescored has no loop."""
        return [
            rate for f in figures if self.holds(f) for rate in self.rates(f) if rate is not None
        ]

    def last(self, figures: Sequence[Record]) -> Record:
        return [f for f in figures if self.holds(f)][-1]

    def holds(self, figures: Record) -> bool:
        rates = self.rates(figures)
        return bool(rates) and None not in rates

    def run(self, figures: Record) -> Record:
        """Where the latencies and the tokens a round of it are."""
        return figures["closed"] if self is CLOSED else median_run(figures)


def basis_of(sides: Sequence[Sequence[Record]]) -> Basis:
    """The first of BASES that both sides of a comparison have, each at least once."""
    return next(basis for basis in BASES if all(any(map(basis.holds, side)) for side in sides))


def _each_run(key: str) -> Callable[[Record], list[float | None]]:
    return lambda figures: [run.get(key) for run in figures["runs"]]


def _closed_told(figures: Record) -> str:
    count, seconds = figures["requests"], figures["closed"]["seconds"]
    return (
        f"closed loop: {count} clients, each sends its prompt again once its answer is complete; "
        f"{seconds:g} s are counted from {WARM_S:g} s after all have begun, the first answers are "
        "of unequal lengths so that they are not in step; within it are the first tokens of the "
        "answers, whose prompts are cached"
    )


def _sent(figures: Record) -> str:
    return f", sent {figures['sent']} so that all begin together" if "sent" in figures else ""


LONE = Basis("runs", _each_run("after_first"), lambda _: "rate from the first token to the last")
CLOSED = Basis("windows", lambda figures: figures.get("closed", {}).get("rates", ()), _closed_told)
ALL_RUN = Basis(
    "runs",
    _each_run("steady"),
    lambda figures: (
        f"fixed set{_sent(figures)}, rate while all run, from token {WARM_TOKENS} on to the end of "
        "the first answer"
    ),
)
WHOLE = Basis(
    "runs",
    _each_run("whole"),
    lambda figures: f"fixed set{_sent(figures)}, from sending to the last token",
)
# Not the closed loop, whose arrivals may take most of its time.
BASES = (LONE, ALL_RUN, WHOLE)


def share(one: Record, other: Record, *keys: str) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)


def share_prompts(one: Record, other: Record) -> bool:
    """Whether figures of one case are of the same prompts, and of outputs as long."""
    mine, theirs = (figures.get("chosen") or {} for figures in (one, other))
    return share(one, other, "requests", "tokens") and share(mine, theirs, "digest")
