"""The cases that are measured, by name: what each shows, and what it would take to be content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

# Measure -> the module that runs it, and whether that module takes the names of cases.
MEASURES = {
    "serving": ("benchmarks.serving", True),
    "acceptance": ("benchmarks.acceptance", False),
    "query_statistics": ("benchmarks.query_statistics", False),
    "kernels": ("benchmarks.kernels", False),
    "checksums": ("benchmarks.checksums", False),
}
SMOL = "SmolLM2-135M"
SHAPE_8B = "shape:8b"
SHAPE_24B = "shape:24b"
# What an 80 GB card leaves beside an 8B model.
POOL_OF_80_GB = 442_000
# What the cases of model shapes replay in place of real acceptance (benchmarks/replay).
REPLAY = "run-lengths.json:snapkv+int4had 0.2:greedy"


class UnknownCaseError(ValueError):
    """A name that is not registered, or that means something else than what was asked for."""


@dataclass(frozen=True)
class Case:
    """A set-up with a name.

    Attributes:
        shows: what its figures say, in half a sentence.
        context: tokens of each prompt.
        requests: how many run at once; for measures without a server, how many there are.
        least_factor: value over baseline that is wanted at least (of times: baseline over value),
            None where nothing is.
        measure: key of MEASURES; its rows lie in the results file of that name.
        repeats: of each timed fixed set, or run of arrivals.
        tokens: of each answer.
        prefixes, shared_tokens: so many prefixes of so many tokens, the context's first, are each
            shared by requests / prefixes prompts.
        arrivals: requests arrive as sglang.bench_serving sends them, at this share of what the
            unmodified server can take; None: all at once, prefixes cached.
        queued: all are released at once and need more KV than the device has; what is timed ends
            with the last token.
        pool_tokens: KV memory of every server, in tokens of full KV, with the draft pool of ours
            (benchmarks/serving/pools.py); None: what the card has.
        host_gb: of the host tier, in 10^9 bytes.
    """

    name: str
    shows: str
    model: str
    context: int
    requests: int
    least_factor: float | None
    measure: str
    repeats: int = 3
    tokens: int = 512
    prefixes: int = 0
    shared_tokens: int = 0
    arrivals: float | None = None
    queued: bool = False
    pool_tokens: int | None = None
    host_gb: float = 0.0


# Offloading must not cost where it does not pay: of the rate with the flag and without offloading.
LEAST_OF_ATTACHED = 0.99

# A figure near 1 must tell small losses from noise.
_CLOSE: dict[str, Any] = {"repeats": 7}
# The longest answers of which prompts of 7,700 tokens leave room in a context window of 8,192.
_FILLS_WINDOW: dict[str, Any] = {"tokens": 480}


def _serving(
    name: str, model: str, context: int, requests: int, least: float, shows: str, **more: Any
) -> Case:
    return Case(name, shows, model, context, requests, least, "serving", **more)


def _queued(
    name: str,
    model: str,
    context: int,
    requests: int,
    least: float | None,
    shows: str,
    host_gb: float,
    **more: Any,
) -> Case:
    more = {"repeats": 2, "queued": True, "host_gb": host_gb} | more
    return Case(name, shows, model, context, requests, least, "serving", **more)


CASES = {
    case.name: case
    for case in (
        _serving(
            *("smol-7k7-x256", SMOL, 7700, 256, 3.0, "the whole context window, a large batch"),
            **_FILLS_WINDOW,
        ),
        _serving(
            *("smol-7k7-x128", SMOL, 7700, 128, 2.5, "the whole context window, half the batch"),
            **_FILLS_WINDOW,
        ),
        _serving("smol-4k-x128", SMOL, 4096, 128, 1.7, "half the context window"),
        _serving("smol-1k-x32", SMOL, 1024, 32, 0.98, "too little KV to gain on", **_CLOSE),
        _serving("smol-1k-x1", SMOL, 1024, 1, 0.98, "one short request", **_CLOSE),
        _serving("8b-32k-x12", SHAPE_8B, 32768, 12, 2.0, "long contexts that fill the pool"),
        _serving("8b-8k-x48", SHAPE_8B, 8192, 48, 1.9, "the same KV in shorter contexts"),
        _serving(
            *("8b-shared-x48", SHAPE_8B, 33792, 48, 2.5, "six documents, eight readers each"),
            prefixes=6,
            shared_tokens=32768,
        ),
        _serving("8b-1k-x32", SHAPE_8B, 1024, 32, 0.98, "weights cost more than KV", **_CLOSE),
        _serving("8b-1k-x1", SHAPE_8B, 1024, 1, 0.98, "one short request", **_CLOSE),
        _serving(
            *("smol-mix", SMOL, 1024, 0, 0.97, "short requests that come and go"),
            repeats=3,
            tokens=128,
            arrivals=0.7,
        ),
        _queued(
            *("24b-16k-pool48k", SHAPE_24B, 16384, 8, 2.0, "two requests fit, eight run", 24),
            pool_tokens=48_000,
        ),
        _queued(
            *("24b-32k-queue16", SHAPE_24B, 32768, 16, 1.4, "five requests fit, sixteen run", 90),
            pool_tokens=175_000,
        ),
        _queued(
            *("8b-32k-queue24", SHAPE_8B, 32768, 24, 1.9, "twice as many as fit, a small model"),
            host_gb=106,
            pool_tokens=POOL_OF_80_GB,
        ),
        _queued(
            *("8b-shared-16x4", SHAPE_8B, 33792, 64, 2.0, "sixteen documents, four readers each"),
            host_gb=84,
            pool_tokens=POOL_OF_80_GB,
            prefixes=16,
            shared_tokens=32768,
        ),
        _queued(
            *("smol-7k7-pool8", SMOL, 7700, 256, 1.7, "an eighth of the KV fits, tokens checked"),
            host_gb=50,
            tokens=256,
            pool_tokens=32 * 7700,
        ),
        _queued(
            *("fits-anyway", SHAPE_8B, 32768, 12, None, "offloading where everything fits"),
            host_gb=54,
            pool_tokens=POOL_OF_80_GB,
            tokens=256,
        ),
        Case(
            "acceptance-2k",
            "how many drafted tokens stand, on eight prompts of real text",
            *(SMOL, 2000, 8, None, "acceptance"),
        ),
        Case(
            "query-statistics-2k",
            "what a cheaper covariance of the queries loses in expected attention",
            *(SMOL, 2000, 8, None, "query_statistics"),
        ),
        Case(
            "kernels",
            "time and memory traffic of each kernel, in the shapes of two models",
            *("shapes only", 0, 0, None, "kernels"),
        ),
        Case(
            "checksums",
            "what it costs to check what comes back from the host",
            *("shape:8b", 1024, 1, None, "checksums"),
        ),
    )
}


def find(name: str) -> Case:
    """The registered case of that name.

    Raises:
        UnknownCaseError: there is none.
    """
    if name not in CASES:
        raise UnknownCaseError(f"no case is called {name!r}; known: {', '.join(CASES)}")
    return CASES[name]


def serving_case(text: str) -> Case:
    """A registered serving case by name, or an ad-hoc one out of ``NAME:CONTEXT:REQUESTS``, or
    queued out of ``NAME:CONTEXT:REQUESTS:POOL_TOKENS:HOST_GB``.

    Raises:
        UnknownCaseError: unknown or of another measure; or an ad-hoc case that takes the name of
            a registered one with other numbers, whose rows would pass for that one's.
    """
    if ":" not in text:
        case = find(text)
        if case.measure != "serving":
            raise UnknownCaseError(f"{text} is measured by {case.measure}, not by serving")
        return case
    try:
        case = _ad_hoc(*text.split(":"))
    except (ValueError, TypeError):
        raise UnknownCaseError(
            f"{text!r} is neither NAME:CONTEXT:REQUESTS nor "
            "NAME:CONTEXT:REQUESTS:POOL_TOKENS:HOST_GB"
        ) from None
    name = case.name
    known = CASES.get(name)
    if known is None:
        return case
    if (known.context, known.requests) != (case.context, case.requests):
        raise UnknownCaseError(
            f"{name} is registered as {name}:{known.context}:{known.requests}; take another name"
        )
    return known


def _ad_hoc(name: str, context: str, requests: str, *queue: str) -> Case:
    case = Case(name, "ad hoc", "", int(context), int(requests), None, "serving")
    if case.context < 1 or case.requests < 1:
        raise ValueError("nothing to send")
    if queue:
        pool, host = queue
        tier = float(host)
        return replace(case, repeats=2, queued=True, pool_tokens=int(pool), host_gb=tier)
    return replace(case, **_CLOSE) if case.requests == 1 else case


def commands_of(cases: Sequence[Case], arguments: Sequence[str]) -> list[list[str]]:
    """``module, argument, ...`` of each measure that the cases need, in the cases' order.

    Args:
        arguments: passed on to the measure.

    Raises:
        UnknownCaseError: arguments for more than one measure.
    """
    measures = list(dict.fromkeys(case.measure for case in cases))
    if arguments and len(measures) > 1:
        raise UnknownCaseError(f"arguments after -- go to one measure, here are {measures}")
    commands = []
    for measure in measures:
        module, takes_names = MEASURES[measure]
        named = [case.name for case in cases if case.measure == measure] if takes_names else []
        flags = [part for name in named for part in ("--case", name)]
        commands.append([module, *flags, *arguments])
    return commands
