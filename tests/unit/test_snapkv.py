"""SnapKV against its formula: attention of the last queries, averaged and smoothed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sglang_vericache.compressors.base import ScoreInputs
from sglang_vericache.compressors.scorers.snapkv import SnapKV

# float32 softmax over at most 300 tokens, compared with float64; scores are at most 1.
TOLERANCE = 1e-6


def score(keys, queries, positions, kernel=1, scaling=0.3, start=0) -> np.ndarray:
    inputs = ScoreInputs(
        keys, torch.zeros_like(keys), start, scaling, queries, torch.as_tensor(positions)
    )
    return SnapKV(window=len(queries), kernel=kernel).score(inputs).numpy()


def formula(keys, queries, positions, kernel, scaling) -> np.ndarray:
    """``[H, T]`` in float64 with loops: query head g reads kv head g // (Hq / H)."""
    keys, queries = keys.double().numpy(), queries.double().numpy()
    tokens, heads, _ = keys.shape
    window, query_heads, _ = queries.shape
    group = query_heads // heads
    mass = np.zeros((heads, tokens))
    for query_head in range(query_heads):
        head = query_head // group
        for w in range(window):
            seen = min(int(positions[w]) + 1, tokens)
            logits = [scaling * queries[w, query_head] @ keys[t, head] for t in range(seen)]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            for t in range(seen):
                mass[head, t] += weights[t] / sum(weights) / (group * window)
    half = kernel // 2
    smooth = np.zeros_like(mass)
    for t in range(tokens):
        smooth[:, t] = mass[:, max(0, t - half) : t + half + 1].sum(1) / kernel
    return smooth


@pytest.mark.parametrize(
    ("tokens", "heads", "group", "dim", "window", "kernel"),
    [
        pytest.param(40, 1, 1, 16, 8, 1, id="one-head"),
        pytest.param(40, 2, 1, 16, 8, 5, id="mha"),
        pytest.param(63, 2, 4, 64, 9, 5, id="gqa-4"),
        pytest.param(50, 2, 7, 80, 5, 3, id="gqa-7"),
        pytest.param(60, 1, 3, 128, 1, 7, id="one-query"),
        pytest.param(8, 1, 2, 16, 8, 5, id="window-is-the-path"),
        pytest.param(3, 1, 1, 8, 2, 9, id="kernel-wider-than-the-path"),
    ],
)
def test_formula(tokens, heads, group, dim, window, kernel):
    """Catches a wrong scale, a softmax over the wrong axis, heads grouped the wrong way round, a
    missing causal mask, a mean over the wrong axes and smoothing that is one off."""
    keys = torch.randn(tokens, heads, dim)
    queries = torch.randn(window, heads * group, dim)
    positions = torch.arange(tokens - window, tokens)
    found = score(keys, queries, positions, kernel)
    wanted = formula(keys, queries, positions, kernel, 0.3)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_window_at_scattered_positions():
    """Catches a mask from the window's place instead of each query's own position: windows that
    were joined from two prefills have gaps."""
    keys, queries = torch.randn(80, 2, 16), torch.randn(5, 4, 16)
    positions = torch.tensor([3, 4, 30, 31, 79])
    found = score(keys, queries, positions)
    np.testing.assert_allclose(found, formula(keys, queries, positions, 1, 0.3), atol=TOLERANCE)
    # Tokens 32 to 79 are seen by one of the five queries: a fifth of the mass at most.
    assert found[:, 32:].sum(axis=1).max() <= 1 / 5 + TOLERANCE


def test_positions_count_from_the_start():
    """Catches keys numbered from zero while the queries are numbered along the path."""
    keys, queries = torch.randn(20, 1, 8), torch.randn(2, 1, 8)
    np.testing.assert_array_equal(
        score(keys, queries, [109, 112], start=100), score(keys, queries, [9, 12])
    )


def test_future_tokens_get_nothing():
    """Catches a causal mask that lets a query see its successor."""
    keys, queries = torch.randn(20, 1, 8), torch.randn(2, 1, 8)
    found = score(keys, queries, [9, 12])
    assert (found[0, 13:] == 0).all()
    assert (found[0, :13] > 0).all()


def test_query_sees_itself():
    """Catches a mask that hides a query's own token."""
    assert score(torch.randn(4, 1, 8), torch.randn(1, 1, 8), [0])[0].tolist() == [1, 0, 0, 0]


def test_heads_do_not_see_each_other():
    """Catches query heads shared among kv heads: equal heads score equally."""
    keys, queries = torch.randn(30, 1, 16), torch.randn(6, 3, 16)
    positions = torch.arange(24, 30)
    alone = score(keys, queries, positions)
    both = score(
        torch.cat([keys, torch.randn(30, 1, 16), keys], 1),
        torch.cat([queries, torch.randn(6, 3, 16), queries], 1),
        positions,
    )
    np.testing.assert_allclose(both[[0, 2]], np.repeat(alone, 2, 0), atol=TOLERANCE)


def test_order_of_heads_in_a_group_changes_nothing():
    """Catches grouping by remainder instead of by block: heads 0 to 2 read kv head 0."""
    keys, queries = torch.randn(30, 2, 16), torch.randn(6, 6, 16)
    positions = torch.arange(24, 30)
    within = queries[:, [2, 0, 1, 5, 4, 3]]
    np.testing.assert_allclose(
        score(keys, within, positions), score(keys, queries, positions), atol=TOLERANCE
    )


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_smoothing_spreads_one_token_over_its_neighbours(kernel):
    """Catches a kernel that is shifted to one side or does not divide by its width."""
    keys = torch.zeros(21, 1, 4)
    keys[10] = 1e4
    found = score(keys, torch.ones(1, 1, 4), [20], kernel)[0]
    wanted = np.zeros(21)
    wanted[10 - kernel // 2 : 11 + kernel // 2] = 1 / kernel
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_mass_adds_up_to_one():
    """Catches weights that are not a distribution, so that paths could not be compared."""
    found = score(torch.randn(50, 3, 16), torch.randn(7, 6, 16), torch.arange(43, 50))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=50 * TOLERANCE)


def test_large_logits_do_not_overflow():
    """Catches an exponential without its maximum taken out."""
    keys = torch.randn(30, 1, 16) * 1e3
    assert np.isfinite(score(keys, torch.randn(4, 1, 16) * 1e3, torch.arange(26, 30))).all()
