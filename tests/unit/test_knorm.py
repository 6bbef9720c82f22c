"""Knorm against its formula: minus the norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_vericache.compressors.base import ScoreInputs
from sglang_vericache.compressors.scorers.knorm import Knorm

# float32 sums over at most 128 squares, compared with float64.
RELATIVE = 1e-6


def score(keys: torch.Tensor) -> torch.Tensor:
    return Knorm().score(ScoreInputs(keys, None, 0, 1.0))


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 8), (63, 3, 80), (300, 4, 128)])
def test_formula(tokens, heads, dim):
    """Catches a norm over the wrong axis, a squared or a positive one."""
    keys = torch.randn(tokens, heads, dim) * torch.logspace(-3, 3, tokens)[:, None, None]
    wanted = [
        [-(sum(float(x) ** 2 for x in keys[t, h]) ** 0.5) for t in range(tokens)]
        for h in range(heads)
    ]
    np.testing.assert_allclose(score(keys).numpy(), wanted, rtol=RELATIVE)


def test_bfloat16_keys_do_not_tie():
    """Catches a norm in the keys' own type: bfloat16 has 8 bits, and ties are cut at random."""
    keys = torch.randn(4000, 1, 128).bfloat16()
    assert score(keys).unique().numel() > 3900
