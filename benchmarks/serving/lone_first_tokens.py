"""Times to first token of lone requests: in the cache or not, on an idle server or right after
another one's end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.serving.client import StreamingClient
from benchmarks.serving.wording import spread

# Requests of each kind, after a first one, and the tokens of each: the first one of an answer that
# goes on, as users wait for it.
REQUESTS, TOKENS = 40, 16
# What the server does after an answer ends is over by then.
IDLE_S = 0.1
# By what was sent before; True where it is cached, and seconds before each.
KINDS = {
    "uncached": (False, IDLE_S),
    "cached": (True, IDLE_S),
    "uncached, at once": (False, 0.0),
    "cached, at once": (True, 0.0),
}


def measure_first_tokens(
    client: StreamingClient, prompt: Sequence[int], tick: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds to first token by kind.

    Each uncached prompt begins with another token of ``prompt``. Flushing the cache between them
    would also give the device's memory back, which the next request would then ask for again.
    """
    times: dict[str, list[float]] = {}
    begin = 0
    for kind, (cached, pause) in KINDS.items():
        tick(f"{kind} requests")
        times[kind] = []
        for _ in range(REQUESTS + 1):
            begin = begin if cached else (begin + 1) % len(prompt)
            time.sleep(pause)
            [answer] = client.fixed_set([[*prompt[begin:], *prompt[:begin]]], TOKENS)
            times[kind].append(answer.stream.first_token_s)
        del times[kind][0]
    return times


def first_token_notes(
    mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> Iterator[str]:
    """What a row says of them, where both sides have measured them.

    Args:
        mine: figures of all starts with the flag.
        theirs: those of the baseline.
    """
    parts = []
    for kind in KINDS:
        both = [
            [
                1000 * t
                for figures in side
                for t in figures.get("lone_first_token_s", {}).get(kind, ())
            ]
            for side in (mine, theirs)
        ]
        if all(both):
            one, other = (
                f"{statistics.median(times):.2f} {spread(statistics.quantiles(times, n=4))}"
                for times in both
            )
            parts.append(f"{kind} {one} ms, baseline {other}")
    if parts:
        yield (
            f"first tokens of lone requests: {'; '.join(parts)} (medians and quartiles of "
            f"{REQUESTS} a start, each {IDLE_S:g} s or at once after another one)"
        )
