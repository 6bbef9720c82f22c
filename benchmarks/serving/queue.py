"""More requests than the device holds, released at once: tokens from the release to the last."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.registry import Case
from benchmarks.serving.client import Answer, StreamingClient
from benchmarks.serving.figures import Divergence, Stream, whole_rate
from benchmarks.serving.measure import latencies, tokens_per_round
from benchmarks.serving.pools import main_tokens
from benchmarks.serving.prompts import repetition
from benchmarks.serving.server import ServingServer

# Of the plugin's numbers of offloading, those that only grow.
COUNTED = (
    *("fetches", "fetched_tokens", "fetched_bytes", "fetch_seconds"),
    *("detachments", "attachments", "failed", "late", "cancelled"),
)


def host_flags(case: Case) -> str:
    """SGLang's own host tier, written as requests are computed; its size is a whole number."""
    return (
        f"--enable-hierarchical-cache --hicache-size {math.ceil(case.host_gb)} "
        "--hicache-write-policy write_through"
    )


def offload_flags(case: Case) -> str:
    """The plugin's, of the same size or, where that is no whole number, a little less."""
    return f"--vericache-offload auto --vericache-host-memory {int(case.host_gb * 1e9) >> 20}MiB"


def shared_set_up(cases: Sequence[Case]) -> Case | None:
    """One of the cases, which stands for all where they are queued: None where none is.

    Raises:
        ValueError: they need different servers.
    """
    queued = [case for case in cases if case.queued]
    if not queued:
        return None
    first = queued[0]
    if len(queued) < len(cases) or any(
        (case.pool_tokens, case.host_gb) != (first.pool_tokens, first.host_gb) for case in queued
    ):
        names = ", ".join(case.name for case in cases)
        raise ValueError(f"{names} differ in their KV pool or host tier: a call for each")
    return first


def concurrencies(case: Case) -> list[int]:
    """At which an unmodified server is measured, for its own best: everything at once, and what
    fits the pool. SGLang admits by estimates and takes running requests back when it errs."""
    levels = [case.requests]
    if case.pool_tokens:
        counts = range(1, case.requests + 1)
        fitting = sum(main_tokens(case, count) <= case.pool_tokens for count in counts)
        levels.append(max(fitting, 1))
    return list(dict.fromkeys(levels))


def measure_queue(
    server: ServingServer,
    case: Case,
    prompts: Sequence[Sequence[int]],
    repeats: int,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """The figures of a case as plain values.

    The prompts lie in the host tier before the clock starts, and those that fit on the device.
    """
    client = StreamingClient(server.url)
    tick("prefill")
    cached_within = server.prefill_in_turn(prompts)
    figures: dict[str, Any] = {
        "context": case.context,
        "requests": len(prompts),
        "tokens": case.tokens,
        "prefill_s": cached_within,
        "levels": {},
    }
    levels = [case.requests] if server.plugin else concurrencies(case)
    tick("first run")  # draft views are built here
    first = client.queue(prompts, case.tokens, levels[0])
    figures["first_whole"] = whole_rate([answer.stream for answer in first])
    for level in levels:
        runs = []
        for i in range(repeats):
            tick(f"run {i + 1}, {level} at once")
            before = server.status() or {}
            answers = client.queue(prompts, case.tokens, level)
            runs.append(_run(answers, before, server.status() or {}))
        figures["levels"][str(level)] = {"runs": runs}
        outputs = [answer.output for answer in answers]
        if level == levels[0]:
            figures["outputs"] = outputs
        else:
            figures["itself"] = vars(Divergence.between(outputs, figures["outputs"]))
    figures["repetition"] = [round(repetition(output), 4) for output in figures["outputs"]]
    return figures


def _run(answers: Sequence[Answer], before: dict[str, Any], after: dict[str, Any]) -> dict:
    streams = [answer.stream for answer in answers]
    seconds = max(s.ended for s in streams) - min(s.started for s in streams)
    offload = _gained(before.get("offload", {}), after.get("offload", {}))
    phases = _gained(before.get("phase_seconds", {}), after.get("phase_seconds", {}))
    return {
        "whole": whole_rate(streams),
        "seconds": seconds,
        "running": running(streams),
        "slowest_to_median": slowest_to_median(streams),
        "tokens_per_round": tokens_per_round(answers),
        "offload": {name: offload[name] for name in COUNTED if name in offload},
        "phases_s": phases,
        **latencies(answers),
    }


def _gained(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    return {
        name: round(value - before.get(name, 0), 4)
        for name, value in after.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def running(streams: Sequence[Stream]) -> list[float]:
    """Requests past their first token: on average from the release to the last token, and most."""
    began = min(s.started for s in streams)
    spans = [(s.events[0][0], s.ended) for s in streams]
    seconds = max(s.ended for s in streams) - began
    changes = sorted([(a, 1) for a, _ in spans] + [(b, -1) for _, b in spans])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return [sum(b - a for a, b in spans) / seconds, float(most)]


def slowest_to_median(streams: Sequence[Stream]) -> float:
    """Fairness: the longest time from the release to a request's last token, by the median one."""
    times = [s.ended - s.started for s in streams]
    return max(times) / statistics.median(times)


def best_level(figures: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The concurrency with the highest median rate, and its figures."""
    levels = figures["levels"]
    best = max(levels, key=lambda n: statistics.median(r["whole"] for r in levels[n]["runs"]))
    return int(best), levels[best]


def link_use(run: dict[str, Any]) -> str | None:
    """What the link to the host did; None where nothing was fetched."""
    moved = run["offload"]
    if not moved.get("fetches"):
        return None
    seconds = moved["fetch_seconds"]
    rate = moved["fetched_bytes"] / seconds / 1e9 if seconds else float("nan")
    return (
        f"{moved['fetches']:.0f} fetches of {moved['fetched_bytes'] / 1e9:.1f} GB in all, link "
        f"busy {seconds / run['seconds']:.0%} of the time at {rate:.1f} GB/s; "
        f"{moved['failed']:.0f} failed, {moved['late']:.0f} late, {moved['cancelled']:.0f} "
        "cancelled"
    )
