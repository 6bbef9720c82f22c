"""One server, one case: prefixes cached, decoding timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.registry import Case
from benchmarks.serving.client import Answer, ClosedLoop, StreamingClient
from benchmarks.serving.figures import (
    Divergence,
    begun_within_s,
    percentiles,
    rate_after_first,
    steady_stretch,
    whole_rate,
    window_rates,
)
from benchmarks.serving.lone_first_tokens import measure_first_tokens
from benchmarks.serving.prompts import repetition
from benchmarks.serving.server import ServingServer

# Times of the phases are read around a run; a profile of them goes with the figures.
Tick = Callable[[str], None]
# Equal parts of a closed loop, for its median and spread: as many as a lone request is timed.
WINDOWS = 7
# How a fixed set was sent; older figures do not say, theirs was sent prompt by prompt.
IN_ONE_REQUEST = "in one request"


def measure(
    server: ServingServer,
    case: Case,
    prompts: Sequence[Sequence[int]],
    repeats: int,
    closed_seconds: float,
    itself: bool,
    tick: Tick = lambda what: None,
) -> dict[str, Any]:
    """The figures of a case as plain values; its prompts stay in the server's cache.

    Args:
        closed_seconds: counted time of the closed loop; 0 for none. A lone request has none: it
            would be the fixed set again.
        itself: whether half of the requests are sent once more, to see how often the server's
            outputs part from its own.
        tick: told what begins.
    """
    client = StreamingClient(server.url)
    tick("prefill")
    cached_within = 0.0
    if case.prefixes:  # one reader each, or all would read the prefix anew at the same time
        cached_within = server.prefill(prompts[:: max(len(prompts) // case.prefixes, 1)])
    cached_within += server.prefill(prompts)
    tick("first run")
    first = client.fixed_set(prompts, case.tokens)  # draft views are built here
    figures: dict[str, Any] = {
        "context": case.context,
        "requests": len(prompts),
        "tokens": case.tokens,
        "sent": IN_ONE_REQUEST,
        "prefill_s": cached_within,
        "first_whole": whole_rate([a.stream for a in first]),
        "runs": [],
    }
    answers = first
    for _ in range(repeats):
        tick("runs")
        before = server.phases()
        answers = client.fixed_set(prompts, case.tokens)
        figures["runs"].append(_run(answers, before, server.phases()))
    figures["outputs"] = [answer.output for answer in answers]
    figures["repetition"] = [round(repetition(answer.output), 4) for answer in answers]
    half = len(prompts) // 2
    if half and itself:
        tick("half as many")
        others = [a.output for a in client.fixed_set(prompts[:half], case.tokens)]
        figures["itself"] = vars(Divergence.between(others, figures["outputs"][:half]))
    if closed_seconds > 0 and len(prompts) > 1:
        tick("closed loop")
        loop = client.closed_loop(prompts, case.tokens, closed_seconds)
        tick("loop's end")
        server.abort()
        figures["closed"] = _closed(loop)
        server.settle()
    if len(prompts) == 1:
        figures["lone_first_token_s"] = measure_first_tokens(client, prompts[0], tick)
    return figures


def _closed(loop: ClosedLoop) -> dict[str, Any]:
    streams = [answer.stream for answer in loop.answers]
    return {
        "rates": window_rates(streams, loop.start, loop.end, WINDOWS),
        "seconds": loop.end - loop.start,
        "complete": len(loop.complete),
        "running": loop.running,
        "tokens_per_round": tokens_per_round(loop.complete),
        **latencies(loop.inside),
    }


def _run(answers: Sequence[Answer], before: dict, after: dict) -> dict[str, Any]:
    streams = [answer.stream for answer in answers]
    steady = steady_stretch(streams)
    return {
        "steady": steady and steady.rate,
        "steady_s": steady and steady.seconds,
        "begun_within_s": begun_within_s(streams),
        "whole": whole_rate(streams),
        "after_first": rate_after_first(streams[0]) if len(streams) == 1 else None,
        "tokens_per_round": tokens_per_round(answers),
        "phases_s": {name: round(after[name] - before[name], 4) for name in after},
        **latencies(answers),
    }


def latencies(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of first tokens, and from each token to the next, of those that were sent one by one."""
    begun = [answer for answer in answers if answer.events]
    watched = [answer.stream for answer in begun if answer.watched]
    return {
        "first_token_s": percentiles([a.stream.first_token_s for a in begun]),
        "between_tokens_s": percentiles([gap for s in watched for gap in s.gaps_s()]),
        "between_tokens_even_s": percentiles([gap for s in watched for gap in s.even_gaps_s()]),
    }


def tokens_per_round(answers: Sequence[Answer]) -> float | None:
    """Of drafted rounds; None where none was."""
    counters = [answer.counters for answer in answers if answer.counters]
    rounds = sum(c["rounds"] for c in counters)
    return 1 + sum(c["accepted"] for c in counters) / rounds if rounds else None


def median_run(figures: dict[str, Any]) -> dict[str, Any]:
    """The run whose whole rate is the median (of an even number the lower one)."""
    middle = statistics.median_low(run["whole"] for run in figures["runs"])
    return next(run for run in figures["runs"] if run["whole"] == middle)
