"""Which prompts are timed: those on which the unmodified server does not go round in circles.

A text that repeats itself is drafted better than any other, so prompts whose plain answer loops
would flatter a drafting server.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.registry import Case
from benchmarks.serving.prompts import Prompts, digest, repetition

MOST_REPETITION = 0.3
MOST_SHARED_TOKENS = 64
# Of each answer at most so many tokens are looked at, for choosing takes seconds of a lease; rows
# count what all of the timed answers repeat.
LOOKED_AT = 256
# Answers that are asked for at once: enough to see how each kind of prompt does, and few enough for
# a search to end soon after it has found its prompts.
LEAST_WAVE, WAVE = 16, 256

Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


class SelectionError(RuntimeError):
    """No prompts to time."""


@dataclass(frozen=True)
class Selection:
    """The prompts of a case.

    Attributes:
        context, tokens: of each prompt, and of the answers that were looked at.
        numbers: of `Prompts`, as many as the case has requests.
        digest: of the prompts; other texts under the same numbers are other prompts.
        tried: so many prompts were answered to find them.
        model: whose answers were looked at; "" in older files.
    """

    context: int
    tokens: int
    numbers: tuple[int, ...]
    digest: str
    tried: int
    model: str = ""

    def serves(self, case: Case) -> bool:
        """Whether its first prompts are a choice for that case as well. Loops last to the end of an
        answer, so one without any has none before."""
        looked_at = self.context == case.context and self.tokens >= looked_at_of(case)
        return looked_at and len(self.numbers) >= case.requests

    def first(self, source: Prompts, case: Case) -> Selection:
        """A choice of as many of them as the case has requests.

        Raises:
            SelectionError: as `prompts`; the digest of a part would be that of any texts.
        """
        self.prompts(source, case)
        numbers = self.numbers[: case.requests]
        return replace(self, numbers=numbers, digest=digest(source.make(self.context, numbers)))

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
        return cls(**values | {"numbers": tuple(values["numbers"])})


def read_selections(path: Path, model: str) -> dict[str, Selection]:
    """By case; none where the file does not exist.

    Raises:
        SelectionError: it holds something else, or a choice by the answers of another model.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        found = {name: Selection.from_json(values) for name, values in known.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SelectionError(f"{path} does not hold a choice of prompts") from None
    others = {choice.model for choice in found.values()} - {"", model}
    if others:
        raise SelectionError(
            f"the prompts in {path} were chosen by answers of {', '.join(sorted(others))}, and the "
            f"model is {model}: choose anew, without --chosen and in another --out"
        )
    return found


def write_selections(path: Path, choices: Mapping[str, Selection]) -> None:
    known = {name: choice.as_json() for name, choice in choices.items()}
    path.write_text(json.dumps(known), encoding="utf-8")


def looked_at_of(case: Case) -> int:
    """Tokens of each answer that a choice looks at."""
    return min(case.tokens, LOOKED_AT)


def wave_size(case: Case) -> int:
    """Prompts of the case that are answered at a time; the first wave is as many numbers."""
    return min(max(2 * case.requests, LEAST_WAVE), WAVE)


def select(
    source: Prompts, case: Case, generate: Generate, seconds: float, model: str = ""
) -> Selection:
    """Try prompts one wave after the other until enough answers repeat little.

    The first wave has every kind of prompt; later ones have those that loop least. Where there are
    not enough within ``seconds``, the least repetitive others fill up: the row counts what was
    really timed.

    Args:
        generate: greedy answers of the unmodified server.

    Raises:
        SelectionError: fewer documents than requests.
    """
    began, found = time.monotonic(), list[tuple[float, int]]()
    beginnings: set[tuple[int, ...]] = set()
    numbers = iter(range(source.count(case.context)))
    kinds = None
    while sum(share <= MOST_REPETITION for share, _ in found) < case.requests:
        if len(found) >= case.requests and time.monotonic() - began > seconds:
            break
        wave = list(_wave(source, case, numbers, kinds, beginnings))
        if not wave:
            break
        answers = generate([prompt for _, prompt in wave], looked_at_of(case))
        found += [(repetition(a), n) for a, (n, _) in zip(answers, wave, strict=True)]
        kinds = _best_kinds(found, source.kind)
    if len(found) < case.requests:
        raise SelectionError(
            f"{case.name} wants {case.requests} documents of {case.context} tokens, only "
            f"{len(found)} are installed here"
        )
    good = [n for share, n in found if share <= MOST_REPETITION]
    rest = [n for share, n in sorted(found) if share > MOST_REPETITION]
    chosen = tuple((good + rest)[: case.requests])
    made = digest(source.make(case.context, chosen))
    return Selection(case.context, looked_at_of(case), chosen, made, len(found), model)


def _wave(
    source: Prompts,
    case: Case,
    numbers: Iterator[int],
    kinds: set[int] | None,
    beginnings: set[tuple[int, ...]],
) -> Iterator[tuple[int, list[int]]]:
    """A wave of prompts of these kinds (None: all) whose beginning none had before."""
    wanted = wave_size(case)
    fitting = (n for n in numbers if kinds is None or source.kind(n) in kinds)
    while some := list(islice(fitting, wanted)):
        for number, prompt in zip(some, source.make(case.context, some), strict=True):
            beginning = tuple(prompt[: MOST_SHARED_TOKENS + 1])
            if beginning not in beginnings:
                beginnings.add(beginning)
                yield number, prompt
                wanted -= 1


def _best_kinds(found: Sequence[tuple[float, int]], kind_of: Callable[[int], int]) -> set[int]:
    """Kinds of which at least half as many answers repeat little as of the best one."""
    tried, good = Counter[int](), Counter[int]()
    for share, number in found:
        tried[kind_of(number)] += 1
        good[kind_of(number)] += share <= MOST_REPETITION
    rates = {kind: good[kind] / tried[kind] for kind in tried}
    return {kind for kind, rate in rates.items() if rate >= max(rates.values()) / 2}
