"""Moments of queries: against numpy, joined in any order, and which of them are used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from score_fakes import make_rotary, rotate

from sglang_vericache.compressors.query_stats import (
    PIECE_TOKENS,
    Moments,
    QueryStats,
    StatsWatch,
)

# float32 means of up to 3000 numbers of size ten, compared with float64; variances about one.
TOLERANCE = 2e-5
LAYERS, HEADS, DIM, PAIRS = 2, 3, 12, 4


def of(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance and covariance within pairs, in float64, by numpy."""
    queries = queries.astype(np.float64)
    covariance = np.stack([np.cov(queries[:, h].T, bias=True) for h in range(queries.shape[1])])
    pair = np.arange(PAIRS)
    return (
        queries.mean(0),
        np.diagonal(covariance, axis1=1, axis2=2),
        covariance[:, pair, pair + PAIRS],
    )


def assert_moments(found: Moments, queries: np.ndarray) -> None:
    assert found.count == len(queries)
    for a, b in zip((found.mean, found.variance, found.cross), of(queries), strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=TOLERANCE)


def correlated(count: int) -> torch.Tensor:
    """Queries far from the origin, whose dimensions depend on each other."""
    return torch.randn(count, HEADS, DIM) @ torch.randn(DIM, DIM) / DIM**0.5 + 10 * torch.randn(
        HEADS, DIM
    )


@pytest.mark.parametrize("count", [2, 65, 3000])
def test_moments(count):
    """Catches a division by count - 1, pairs taken from neighbours, and a difference of large
    numbers: queries often lie ten standard deviations from the origin."""
    queries = correlated(count)
    assert_moments(Moments.of(queries, PAIRS), queries.numpy())


def test_one_query_has_no_spread():
    """Catches not-a-number from a chunk of one token."""
    moments = Moments.of(torch.randn(1, HEADS, DIM), PAIRS)
    assert not moments.variance.any() and not moments.cross.any()


@pytest.mark.parametrize("bounds", [[1], [1, 2, 3], [64, 500, 501], list(range(100, 900, 100))])
def test_chunks_change_nothing(bounds):
    """Catches moments that are averaged over chunks of unlike length, or without the distance of
    their means."""
    queries = correlated(900) + torch.linspace(0, 5, 900)[:, None, None]
    parts = [Moments.of(part, PAIRS) for part in queries.tensor_split(bounds)]
    total = parts[0]
    for part in parts[1:]:
        total = total.then(part)
    assert_moments(total, queries.numpy())


def test_see_undoes_the_rotation_in_pieces():
    """Catches pieces that all begin at the chunk's first position, and a last piece left out."""
    count, start = 2 * PIECE_TOKENS + 77, 90
    rotary = make_rotary(2 * PAIRS, start + count)
    before = correlated(count)
    after = rotate(before, torch.arange(start, start + count), rotary)
    assert_moments(StatsWatch().see(after, start, rotary), before.numpy())


@pytest.mark.parametrize(("start", "first"), [(0, 4), (3, 4), (4, 4), (500, 500)])
def test_sinks_are_left_out(start, first):
    """Catches the queries of the sinks, which are unlike any other's."""
    assert StatsWatch().first_wanted(start, 900) == first


def test_bytes_on_an_8b_model():
    """Catches statistics that outgrow what is kept of a node: 1.3 MB, not 67."""
    layers, heads, dim = 32, 32, 128
    moments = Moments(
        1,
        torch.zeros(layers, heads, dim),
        torch.zeros(layers, heads, dim),
        torch.zeros(layers, heads, dim // 2),
    )
    assert QueryStats(moments, 4, 5).bytes == 1310720


def stats(start: int, end: int, count: int | None = None) -> QueryStats:
    count = count or end - start
    layers = [Moments.of(torch.randn(count, HEADS, DIM), PAIRS) for _ in range(LAYERS)]
    return StatsWatch().observation(layers, start, end)


def test_a_layer_gets_its_own_moments():
    """Catches layers that are mixed up."""
    layers = [Moments.of(torch.randn(9, HEADS, DIM), PAIRS) for _ in range(LAYERS)]
    made = StatsWatch().observation(layers, 4, 13)
    for layer, moments in enumerate(layers):
        found = made.inputs(layer)["query_stats"]
        assert found.count == 9
        assert torch.equal(found.mean, moments.mean)
        assert torch.equal(found.variance, moments.variance)
        assert torch.equal(found.cross, moments.cross)


def test_must_follow():
    """Catches the same queries counted twice."""
    with pytest.raises(ValueError, match=r"\[9, 20\) do not follow queries up to 10"):
        stats(4, 10).then(stats(9, 20))


@pytest.mark.parametrize(
    ("computed", "stored", "count", "borrowed"),
    [
        pytest.param((4, 12), None, 8, False, id="just-enough"),
        pytest.param((4, 11), None, None, False, id="too-few"),
        pytest.param(None, None, None, False, id="nothing"),
        pytest.param(None, (4, 500), 496, True, id="stored"),
        pytest.param((500, 505), (4, 500), 501, True, id="both"),
        pytest.param((900, 990), (4, 500), 586, True, id="both-with-a-gap"),
        pytest.param((499, 500), (4, 500), 496, True, id="prompt-computed-again"),
        pytest.param((4, 500), (4, 20), 496, False, id="computed-saw-more"),
        pytest.param((8, 11), (4, 8), None, False, id="both-too-few"),
    ],
)
def test_choose(computed, stored, count, borrowed):
    """Catches statistics of earlier turns that are thrown away, queries counted twice, and a
    spread estimated from a handful of queries."""
    choice = StatsWatch().choose(
        stats(*computed) if computed else None, stats(*stored) if stored else None, 1000
    )
    assert (choice.observation and choice.observation.count) == count
    assert choice.borrowed == borrowed
