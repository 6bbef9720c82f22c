"""Arrival times -> rates, latencies, divergences."""

from __future__ import annotations

import pytest

from benchmarks.serving.figures import (
    LEAST_STEADY_TOKENS,
    Divergence,
    Stream,
    begun_within_s,
    first_difference,
    percentiles,
    rate_after_first,
    steady_stretch,
    whole_rate,
    window_rates,
)


def even(start: float, rate: float, tokens: int, chunk: int = 1) -> Stream:
    """A stream of ``rate`` tokens a second from ``start`` on, in chunks."""
    counts = sorted({*range(chunk, tokens, chunk), tokens})
    return Stream(start, tuple((start + count / rate, count) for count in counts))


def test_steady_rate_leaves_the_ragged_end_out():
    """Catches a rate that falls because some requests are done earlier than others."""
    streams = [even(0.0, 100.0, 200), even(0.0, 50.0, 200)]
    found = steady_stretch(streams, warm_tokens=32)
    # From the slower one's 32nd token to the end of the faster one.
    assert (found.rate, found.seconds) == pytest.approx((150.0, 2.0 - 32 / 50))
    assert whole_rate(streams) == pytest.approx(400 / 4.0)


def test_late_beginnings_are_left_out():
    """Catches a stretch that begins before everybody runs."""
    streams = [even(0.0, 100.0, 1000), even(5.0, 100.0, 1000)]
    assert steady_stretch(streams, warm_tokens=10).rate == pytest.approx(200.0)
    assert begun_within_s(streams) == pytest.approx(5.0)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks_do_not_matter(chunk):
    """Catches a count of whole chunks at the edges of the stretch."""
    streams = [even(0.0, 100.0, 256, chunk), even(0.1, 90.0, 256)]
    assert steady_stretch(streams).rate == pytest.approx(190.0, rel=0.02)


def test_no_steady_stretch():
    """Catches a rate of requests that did not run at once, and a case that is lost over it."""
    apart = [even(0.0, 100.0, 100), even(2.0, 100.0, 100)]
    assert steady_stretch(apart, warm_tokens=10) is None and whole_rate(apart) > 0
    assert steady_stretch([even(0.0, 100.0, 20)], warm_tokens=32) is None


def test_a_stretch_is_long_enough():
    """Catches the rate of a few chunks, and one over a small part of the answers."""
    long_enough = 32 + LEAST_STEADY_TOKENS
    for rate, tokens, holds in (
        (200.0, long_enough + 1, True),  # of 0.33 s
        (200.0, long_enough - 2, False),
        (400.0, 32 + 101, True),  # of 0.2525 s
        (400.0, 32 + 99, False),
    ):
        found = steady_stretch([even(0.0, rate, tokens), even(0.0, rate, tokens)])
        assert (found is not None) == holds, (rate, tokens)
        assert found is None or found.rate == pytest.approx(2 * rate)
    # One that drafts badly has fewer tokens in it than the average.
    assert steady_stretch([even(0.0, 400.0, 200), even(0.0, 150.0, 200)]) is not None


def test_windows():
    """Catches windows that overlap or leave tokens out, and answers in turn that do not add up."""
    one_by_one = [even(0.0, 100.0, 200, 8), even(2.0, 100.0, 200, 8), even(4.0, 50.0, 200, 8)]
    rates = window_rates(one_by_one, 1.0, 7.0, 3)
    assert rates == pytest.approx([100.0, 75.0, 50.0], rel=0.08)
    total = sum(s.tokens_at(7.0) - s.tokens_at(1.0) for s in one_by_one)
    assert sum(2.0 * rate for rate in rates) == pytest.approx(total)


def test_lone_rate_leaves_the_first_token_out():
    """Catches the time to the first token in a decode rate."""
    assert rate_after_first(Stream(0.0, ((5.0, 1), (6.0, 51), (7.0, 101)))) == 50.0
    assert rate_after_first(Stream(0.0, ((5.0, 1),))) is None


def test_latencies():
    """Catches tokens of one chunk that count as if each had come after a gap."""
    stream = Stream(1.0, ((1.5, 1), (2.5, 4), (2.75, 5)))
    assert stream.first_token_s == 0.5
    assert stream.gaps_s() == [1.0, 0.0, 0.0, 0.25]
    assert stream.even_gaps_s() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.25])
    assert stream.tokens_at(1.0) == 0 and stream.tokens_at(2.0) == 2.5 and stream.tokens_at(9) == 5
    assert percentiles([float(n) for n in range(1, 101)]) == [50.0, 99.0]
    assert percentiles([7.0]) == [7.0, 7.0] and percentiles([]) is None


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2], [1, 2]) is None


def test_divergence():
    """Catches tokens after the first difference that count as chances of one."""
    found = Divergence.between([[1, 2, 3, 4], [5, 6]], [[1, 9, 3, 4], [5, 6]])
    assert found == Divergence(outputs=2, parted=1, tokens=4)
    assert found.per_1000_tokens == 250.0
