"""ExpectedAttention against its formula, and against attention that really happens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from score_fakes import inputs_of, make_inputs, make_rotary, rotate

from sglang_vericache.compressors.query_stats import Moments
from sglang_vericache.compressors.scorers.expected_attention import ExpectedAttention

# Logits of size ten in float32, so weights good to 1e-5 of their size, compared with float64.
RELATIVE, ABSOLUTE = 2e-4, 1e-7
SINKS = 4


def formula(keys, values, queries, rotary, future, scaling) -> np.ndarray:
    """``[H, T]`` in float64 with loops: explicit rotation matrices, explicit covariance.

    Args:
        queries: ``[T, Hq, D]`` before rotary embedding.
    """
    tokens, heads, dim = keys.shape
    group = queries.shape[1] // heads
    pairs = rotary.pairs
    ends = [(2 * p, 2 * p + 1) if rotary.interleaved else (p, p + pairs) for p in range(pairs)]
    turns = []
    for row in rotary.table[tokens : tokens + future].double().numpy():
        turn = np.eye(dim)
        for p, (i, j) in enumerate(ends):
            c, s = row[p], row[pairs + p]
            turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        turns.append(turn)
    turn = np.mean(turns, axis=0)
    kept = np.eye(dim, dtype=bool)
    for i, j in ends:
        kept[i, j] = kept[j, i] = True
    k, v, q = (x.double().numpy() for x in (keys, values, queries))
    scores = np.zeros((heads, tokens))
    for query_head in range(queries.shape[1]):
        head = query_head // group
        seen = q[SINKS:, query_head]
        mean = turn @ seen.mean(0)
        covariance = turn @ (np.cov(seen.T, bias=True) * kept) @ turn.T
        logits = [
            scaling * k[t, head] @ mean + scaling**2 / 2 * k[t, head] @ covariance @ k[t, head]
            for t in range(SINKS, tokens)
        ]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        for t in range(SINKS, tokens):
            share = weights[t - SINKS] / sum(weights) / group
            scores[head, t] += share * np.linalg.norm(v[t, head])
    return scores


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "dim", "rotary_dim", "scale"),
    [
        pytest.param(60, 1, 1, 8, 8, 1.0, id="one-head"),
        pytest.param(63, 2, 4, 32, 32, 1.0, id="gqa-4"),
        pytest.param(50, 2, 7, 20, 20, 1.0, id="gqa-7"),
        pytest.param(70, 2, 2, 24, 8, 1.0, id="partial"),
        pytest.param(70, 1, 2, 16, 16, 1.2, id="yarn"),
    ],
)
def test_formula(tokens, heads, group, dim, rotary_dim, scale, interleaved):
    """Catches a rotation the wrong way or of the wrong positions, a missing half or scale, heads
    grouped the wrong way round, sinks in the softmax or in the moments, values left out."""
    rotary = make_rotary(rotary_dim, tokens + 40, interleaved, scale)
    before = torch.randn(tokens, heads * group, dim) + 2 * torch.randn(heads * group, dim)
    before[:SINKS] *= 30
    positions = torch.arange(tokens)
    keys = rotate(torch.randn(tokens, heads, dim) + torch.randn(heads, dim), positions, rotary)
    values = torch.randn(tokens, heads, dim) * torch.linspace(0.5, 2, tokens)[:, None, None]
    scorer = ExpectedAttention(future=17, covariance=1)
    inputs = inputs_of(scorer, keys, values, rotate(before, positions, rotary), rotary, [9, 10])
    wanted = formula(keys, values, before, rotary, 17, dim**-0.5)
    np.testing.assert_allclose(scorer.score(inputs).numpy(), wanted, RELATIVE, ABSOLUTE)


def test_weights_are_those_of_gaussian_queries():
    """Catches a formula that is right on paper only: over many queries of the assumed kind at one
    position, the mean of exp(logit) is what the score is proportional to."""
    dim, tokens, draws = 8, 40, 400_000
    rotary = make_rotary(dim, tokens + 1)
    spread = torch.randn(2, 2, 4)  # mixes the two dimensions of each pair
    noise = torch.randn(draws, 2, 4)
    before = torch.einsum("npf,pqf->nqf", noise, spread).reshape(draws, 1, dim) * 0.8
    before = before + torch.randn(dim)
    later = rotate(before, torch.full((draws,), tokens), rotary)[:, 0]
    keys = torch.randn(tokens, 1, dim)
    weight = (later.double() @ keys[:, 0].double().T * dim**-0.5).exp().mean(0)[SINKS:]
    scorer = ExpectedAttention(future=1, covariance=1)
    inputs = inputs_of(scorer, keys, torch.ones(tokens, 1, dim), keys, rotary)
    scores = scorer.score(replace(inputs, query_stats=Moments.of(before, dim // 2)))[0, SINKS:]
    # The mean over 400,000 draws is itself only good to some per cent where exponents are large.
    np.testing.assert_allclose(scores / scores.sum(), weight / weight.sum(), rtol=0.05)


def test_sinks_change_nothing():
    """Catches a softmax over the sinks: their weight would flatten that of all others."""
    scorer = ExpectedAttention()
    inputs = make_inputs(scorer)
    before = scorer.score(inputs)
    inputs.keys[:SINKS] *= 50
    assert torch.equal(scorer.score(inputs), before)


def test_path_of_nothing_but_sinks():
    """Catches not-a-number from a softmax over nothing."""
    scorer = ExpectedAttention()
    inputs = make_inputs(scorer, tokens=40)
    short = replace(inputs, keys=inputs.keys[:3], values=inputs.values[:3])
    assert scorer.score(short).isfinite().all()


def test_large_logits_do_not_overflow():
    """Catches an exponential without its maximum taken out."""
    scorer = ExpectedAttention()
    inputs = make_inputs(scorer)
    inputs.keys.mul_(300)
    assert scorer.score(inputs).isfinite().all()


def test_future_must_be_positive():
    """Catches an average over no positions."""
    with pytest.raises(ValueError, match="future=0 must be at least 1"):
        ExpectedAttention(future=0)
