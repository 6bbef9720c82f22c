"""What a row says of a queue beside its rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.serving.measure import median_run
from benchmarks.serving.queue import best_level, link_use
from benchmarks.serving.wording import milliseconds, spread

Record = dict[str, Any]


def queue_rates(starts: Sequence[Record]) -> list[float]:
    """Of all runs at each start's best concurrency."""
    return [run["whole"] for figures in starts for run in best_level(figures)[1]["runs"]]


def median_queue_run(figures: Record) -> Record:
    """At the best concurrency, the run with the median rate (of an even number the lower one)."""
    return median_run(best_level(figures)[1])


def queue_notes(
    mine: Record,
    theirs: Record,
    rates: Sequence[float],
    baseline: Sequence[float],
    servers: str,
) -> Iterator[str]:
    one, other = median_queue_run(mine), median_queue_run(theirs)
    at_once, _ = best_level(theirs)
    yield (
        f"{mine['requests']} requests of {mine['context']} + {mine['tokens']} tokens released at "
        "once, all prompts in the host tier, greedy; all output tokens from the release to the "
        "last one"
    )
    yield (
        f"{len(rates)} runs {spread(rates)}, baseline {len(baseline)} runs {spread(baseline)}, "
        f"best with {at_once} sent at a time{_others(theirs, at_once)}; {servers}"
    )
    yield (
        f"first run, draft views to build, {mine['first_whole']:.0f} tokens/s (baseline "
        f"{theirs['first_whole']:.0f})"
    )
    yield (
        f"running on average {one['running'][0]:.1f}, at most {one['running'][1]:.0f} (baseline "
        f"{other['running'][0]:.1f}, {other['running'][1]:.0f})"
    )
    for name, key in (("first token", "first_token_s"), ("between tokens", "between_tokens_s")):
        yield f"{name} p50/p99 {milliseconds(one[key])} ms (baseline {milliseconds(other[key])})"
    yield (
        f"slowest request {one['slowest_to_median']:.2f} times the median (baseline "
        f"{other['slowest_to_median']:.2f})"
    )
    link = link_use(one)
    if link is not None:
        yield link


def _others(figures: Record, best: int) -> str:
    others = [
        f"{statistics.median(run['whole'] for run in values['runs']):.0f} with {level}"
        for level, values in figures["levels"].items()
        if int(level) != best
    ]
    return f" ({', '.join(others)})" if others else ""
