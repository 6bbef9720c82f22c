"""Which prompts are timed: those on which the unmodified server does not go round in circles.

A text that repeats itself is drafted better than any other, so prompts whose plain answer loops
would flatter a drafting server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.registry import Case
from benchmarks.serving.prompts import Prompts, digest, repetition

MOST_REPETITION = 0.3
MOST_SHARED_TOKENS = 64
# Answers that are asked for at once, so that a search ends soon after it has found enough.
WAVE = 256

Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


class SelectionError(RuntimeError):
    """No prompts to time."""


@dataclass(frozen=True)
class Selection:
    """The prompts of a case.

    Attributes:
        numbers: of `Prompts`, as many as the case has requests.
        digest: of the prompts; other texts under the same numbers are other prompts.
        tried: so many prompts were answered to find them.
    """

    numbers: tuple[int, ...]
    digest: str
    tried: int

    def prompts(self, source: Prompts, case: Case) -> list[list[int]]:
        """Raises:
        SelectionError: this installation has other texts than the one they were chosen on.
        """
        made = source.make(case.context, self.numbers)
        if digest(made) != self.digest:
            raise SelectionError(
                f"the prompts chosen for {case.name} were other texts than this installation has: "
                "choose anew, without --chosen and in another --out"
            )
        return made

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Selection:
        return cls(tuple(values["numbers"]), values["digest"], values["tried"])


def select(source: Prompts, case: Case, generate: Generate, seconds: float) -> Selection:
    """Try prompts one wave after the other until enough answers repeat little.

    Where there are not enough within ``seconds``, the least repetitive others fill up: the row
    counts what was really timed.

    Args:
        generate: greedy answers of the unmodified server.
    """
    found: list[tuple[float, int]] = []
    beginnings: set[tuple[int, ...]] = set()
    began, number = time.monotonic(), 0
    limit = source.count(case.context)
    while number < limit and sum(r <= MOST_REPETITION for r, _ in found) < case.requests:
        if len(found) >= case.requests and time.monotonic() - began > seconds:
            break
        wave: list[tuple[int, list[int]]] = []
        while number < limit and len(wave) < WAVE:
            [prompt] = source.make(case.context, [number])
            beginning = tuple(prompt[: MOST_SHARED_TOKENS + 1])
            if beginning not in beginnings:
                beginnings.add(beginning)
                wave.append((number, prompt))
            number += 1
        answers = generate([prompt for _, prompt in wave], case.tokens)
        found += [(repetition(a), n) for a, (n, _) in zip(answers, wave, strict=True)]
    if len(found) < case.requests:
        raise SelectionError(
            f"{case.name} wants {case.requests} documents of {case.context} tokens, only "
            f"{len(found)} are installed here"
        )
    good = [n for share, n in found if share <= MOST_REPETITION]
    rest = [n for share, n in sorted(found) if share > MOST_REPETITION]
    chosen = tuple((good + rest)[: case.requests])
    return Selection(chosen, digest(source.make(case.context, chosen)), len(found))
