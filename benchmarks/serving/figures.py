"""Arrival times of tokens -> rates and latencies. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# A steady stretch begins when every request has so many tokens: draft views are built, and the
# requests no longer answer in step.
WARM_TOKENS = 32
# A shorter stretch says little: of a few chunks of tokens, or of a part of the texts.
LEAST_STEADY_S, LEAST_STEADY_TOKENS = 0.25, 64
SHARES = (0.5, 0.99)


@dataclass(frozen=True)
class Stream:
    """What arrived of one request.

    Attributes:
        started: when it was sent, in seconds of any clock.
        events: (when, tokens by then), ascending in both.
    """

    started: float
    events: tuple[tuple[float, int], ...]

    @property
    def tokens(self) -> int:
        return self.events[-1][1] if self.events else 0

    @property
    def ended(self) -> float:
        return self.events[-1][0] if self.events else self.started

    @property
    def first_token_s(self) -> float:
        return self.events[0][0] - self.started

    def reached(self, tokens: int) -> float:
        """When the stream had ``tokens`` tokens; inf where it never had."""
        return next((when for when, count in self.events if count >= tokens), math.inf)

    def tokens_at(self, when: float) -> float:
        """Between two events they count as if they came one by one: a chunk is no burst of work."""
        at = bisect_right(self.events, when, key=lambda event: event[0])
        if at == 0:
            return 0.0
        before, count = self.events[at - 1]
        if at == len(self.events):
            return count
        after, more = self.events[at]
        return count + (more - count) * (when - before) / (after - before)

    def gaps_s(self) -> list[float]:
        """From each token to the next as they arrive; 0 within a chunk."""
        gaps: list[float] = []
        for (before, count), (after, more) in pairwise(self.events):
            gaps += [after - before, *([0.0] * (more - count - 1))]
        return gaps

    def even_gaps_s(self) -> list[float]:
        """The same where a chunk's tokens share its time, as sglang.bench_serving counts them."""
        gaps: list[float] = []
        for (before, count), (after, more) in pairwise(self.events):
            gaps += [(after - before) / (more - count)] * (more - count)
        return gaps


def rate_between(streams: Sequence[Stream], start: float, end: float) -> float:
    """Tokens a second of all streams together; ``start`` lies before ``end``."""
    return sum(s.tokens_at(end) - s.tokens_at(start) for s in streams) / (end - start)


def window_rates(streams: Sequence[Stream], start: float, end: float, windows: int) -> list[float]:
    """Tokens a second in each of ``windows`` equal parts of the time from ``start`` to ``end``."""
    edges = [start + (end - start) * i / windows for i in range(windows + 1)]
    return [rate_between(streams, a, b) for a, b in pairwise(edges)]


@dataclass(frozen=True)
class Stretch:
    """The time in which all of a fixed set run.

    Attributes:
        rate: tokens a second of all together.
    """

    rate: float
    seconds: float


def steady_stretch(streams: Sequence[Stream], warm_tokens: int = WARM_TOKENS) -> Stretch | None:
    """From the last one's ``warm_tokens``-th token to the end of the first. None where that is
    less than LEAST_STEADY_S or, on average, LEAST_STEADY_TOKENS of a request: the answers are
    short for the server's speed, or the set does not fit its KV pool.
    """
    start = max(stream.reached(warm_tokens) for stream in streams)
    end = min(stream.ended for stream in streams)
    if end - start < LEAST_STEADY_S:
        return None
    rate = rate_between(streams, start, end)
    enough = rate * (end - start) >= LEAST_STEADY_TOKENS * len(streams)
    return Stretch(rate, end - start) if enough else None


def begun_within_s(streams: Sequence[Stream]) -> float:
    """From the first of all first tokens to the last."""
    firsts = [stream.events[0][0] for stream in streams]
    return max(firsts) - min(firsts)


def rate_after_first(stream: Stream) -> float | None:
    """Tokens a second of a lone request from its first ones on; None where no others came."""
    if len(stream.events) < 2:
        return None
    began, count = stream.events[0]
    return (stream.tokens - count) / (stream.ended - began)


def whole_rate(streams: Sequence[Stream]) -> float:
    """Tokens a second of a fixed set from sending it to its last token, ragged end included."""
    began, ended = min(s.started for s in streams), max(s.ended for s in streams)
    return sum(stream.tokens for stream in streams) / (ended - began)


def percentiles(values: Sequence[float]) -> list[float] | None:
    """Those of SHARES by nearest rank; None without values."""
    ranked = sorted(values)
    return [ranked[max(math.ceil(p * len(ranked)) - 1, 0)] for p in SHARES] if ranked else None


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two outputs part; None where they are the same."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


@dataclass(frozen=True)
class Divergence:
    """How often outputs part from those they are compared with.

    Attributes:
        outputs: compared.
        parted: of them.
        tokens: until they parted, or to the end: what each first difference had the chance of.
    """

    outputs: int
    parted: int
    tokens: int

    @classmethod
    def between(cls, ones: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> Divergence:
        places = [first_difference(a, b) for a, b in zip(ones, others, strict=True)]
        lengths = [
            len(a) if place is None else place + 1 for a, place in zip(ones, places, strict=True)
        ]
        return cls(len(places), sum(place is not None for place in places), sum(lengths))

    @property
    def per_1000_tokens(self) -> float:
        """First differences in 1000 tokens that could have been one."""
        return 1000 * self.parted / self.tokens if self.tokens else 0.0
