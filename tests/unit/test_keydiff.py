"""KeyDiff against its formula: minus the cosine to the mean of the unit keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_vericache.compressors.base import ScoreInputs
from sglang_vericache.compressors.scorers.keydiff import KeyDiff

# float32 sums over at most 128 dimensions and 300 tokens, compared with float64.
TOLERANCE = 2e-6


def score(keys: torch.Tensor) -> np.ndarray:
    return KeyDiff().score(ScoreInputs(keys, torch.zeros_like(keys), 0, 1.0)).numpy()


def formula(keys: np.ndarray) -> np.ndarray:
    """``[T, H, D]`` -> ``[H, T]`` in float64, one token at a time."""
    tokens, heads, _ = keys.shape
    scores = np.zeros((heads, tokens))
    for head in range(heads):
        unit = [key / np.linalg.norm(key) for key in keys[:, head].astype(np.float64)]
        anchor = sum(unit) / tokens
        for token in range(tokens):
            scores[head, token] = -unit[token] @ anchor / np.linalg.norm(anchor)
    return scores


@pytest.mark.parametrize(
    ("tokens", "heads", "dim"), [(1, 1, 8), (2, 3, 64), (63, 2, 80), (300, 4, 128)]
)
def test_formula(tokens, heads, dim):
    """Catches a mean of raw instead of unit keys, a missing sign, mixed up axes."""
    # Lengths that differ by 1000 times: a mean of raw keys would follow the long ones.
    keys = (torch.randn(tokens, heads, dim) + 0.5) * torch.logspace(-1, 2, tokens)[:, None, None]
    np.testing.assert_allclose(score(keys), formula(keys.numpy()), atol=TOLERANCE)


def test_heads_do_not_see_each_other():
    """Catches an anchor taken over all heads: equal heads score equally, others unaffected."""
    keys = torch.randn(50, 1, 16)
    other = torch.randn(50, 1, 16) + 3
    alone = score(keys)
    together = score(torch.cat([keys, other, keys], dim=1))
    np.testing.assert_allclose(together[[0, 2]], np.repeat(alone, 2, 0), atol=TOLERANCE)


def test_common_rotation_changes_nothing():
    """Catches a score that depends on the basis; rotary embedding at a later start is a rotation
    of all keys, and the score of an interval must hold wherever the interval is reused."""
    keys = torch.randn(60, 2, 32) + 0.3
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))
    rotated = (keys.double() @ rotation).float()
    np.testing.assert_allclose(score(rotated), score(keys), atol=TOLERANCE)


def test_order_of_tokens_changes_nothing():
    """Catches a score that depends on positions, which node scope does not allow."""
    keys, order = torch.randn(60, 2, 32) + 0.3, torch.randperm(60)
    np.testing.assert_allclose(score(keys[order]), score(keys)[:, order.numpy()], atol=TOLERANCE)


def test_the_odd_one_out_scores_highest():
    """Catches a sign that keeps the crowd."""
    keys = torch.ones(40, 1, 8)
    keys[17] = -1
    assert score(keys)[0].argmax() == 17


def test_zero_key_is_no_division_by_zero():
    """Catches not-a-number from padding or a dead head."""
    keys = torch.randn(10, 1, 8)
    keys[3] = 0
    assert np.isfinite(score(keys)).all()
    assert np.isfinite(score(torch.zeros(5, 1, 8))).all()
