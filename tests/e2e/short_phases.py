"""Requests of the tests that need only a few."""

from __future__ import annotations

from collections.abc import Iterable

from breadth import ANY_END, tokens
from cases import ANYTHING, Answers, Call, Phase

VICTIM = Call("victim", tokens(77, 700), 900, ANY_END)
SURVIVORS = [Call(f"survivor/{n}", tokens(90 + n, n), 120, ANY_END) for n in (200, 500, 1000)]


def interruption_phases(base: Answers) -> Iterable[Phase]:
    yield Phase("interruptions", [VICTIM, *SURVIVORS], 4)


def mutation_phases(base: Answers) -> Iterable[Phase]:
    calls = [Call(f"mutation/{n}", tokens(3000 + n, n), 60, ANY_END) for n in (120, 350, 800, 1300)]
    yield Phase("mutations", calls, 4, flush_before=True)


def flag_off_phases(base: Answers) -> Iterable[Phase]:
    prompts = {f"off/{n}": tokens(2000 + n, n) for n in (40, 300, 900)}
    calls = [Call(name, prompt, 40, ANY_END, expect=ANYTHING) for name, prompt in prompts.items()]
    yield Phase("flag off", calls, 3)


def growth_phases(base: Answers) -> Iterable[Phase]:
    """Answers long enough for a larger view to be worth it, some over the same prompt."""
    prompts = [tokens(6000 + n, n) for n in (300, 500, 800, 1100, 1500, 1900)]
    prompts += [prompts[2], prompts[2] + tokens(6900, 60)]
    calls = [Call(f"growth/{i}", prompt, 220, ANY_END) for i, prompt in enumerate(prompts)]
    yield Phase("growth", calls, 8, flush_before=True)
