"""Rotary: undone exactly, averaged over positions, in one order of dimensions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from score_fakes import make_rotary, rotate

from sglang_vericache.compressors.rotary import Rotary, turn_back

# float32 rotation forth and back of numbers of size one.
TOLERANCE = 2e-6
STYLES = pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])


def canonical_index(dim: int, rotary_dim: int, interleaved: bool) -> list[int]:
    """Where each dimension of the canonical order stands in the model's."""
    if not interleaved:
        return list(range(dim))
    return [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, dim)]


@STYLES
@pytest.mark.parametrize("scale", [1.0, 1.35], ids=["plain", "yarn"])
@pytest.mark.parametrize(
    ("dim", "rotary_dim"),
    [pytest.param(64, 64, id="full"), pytest.param(80, 32, id="partial"), (2, 2)],
)
def test_undo(dim, rotary_dim, scale, interleaved):
    """Catches a rotation the wrong way, pairs taken from the wrong style, dimensions beyond the
    rotated ones touched, positions counted from zero, and YaRN's factor left in."""
    rotary = make_rotary(rotary_dim, 400, interleaved, scale)
    before = torch.randn(50, 3, dim)
    after = rotate(before, torch.arange(300, 350), rotary)
    wanted = before[..., canonical_index(dim, rotary_dim, interleaved)]
    np.testing.assert_allclose(rotary.undo(after, 300), wanted, atol=TOLERANCE)


def test_undo_of_a_rounded_table():
    """Catches an inverse that takes a table in bfloat16 for exact: cosine and sine of a position
    are then no longer of length one, but what was applied can still be undone."""
    table = make_rotary(32, 100).table.bfloat16()
    rotary = Rotary(table)
    before = torch.randn(100, 2, 32)
    after = rotate(before, torch.arange(100), Rotary(table.float()))
    np.testing.assert_allclose(rotary.undo(after, 0), before, atol=TOLERANCE)


def test_undo_of_half_precision():
    """Catches arithmetic in the queries' own type."""
    rotary = make_rotary(32, 100)
    after = rotate(torch.randn(100, 2, 32), torch.arange(100), rotary).bfloat16()
    undone = rotary.undo(after, 0)
    assert undone.dtype == torch.float32
    np.testing.assert_allclose(undone, rotary.undo(after.float(), 0))


@STYLES
def test_average(interleaved):
    """Catches an average of the wrong positions, and of angles instead of rotations: the mean
    rotation of a vector is the mean of the rotated vectors."""
    rotary = make_rotary(16, 200, interleaved)
    vector = torch.randn(1, 1, 24)
    turned = [rotate(vector, torch.tensor([p]), rotary) for p in range(100, 130)]
    wanted = torch.stack(turned).double().mean(0)
    cos, sin = rotary.average(100, 30)
    back = turn_back(rotary.canonical(vector), cos, -sin)  # the other way round
    index = canonical_index(24, 16, interleaved)
    np.testing.assert_allclose(back, wanted[..., index], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("start", "first"),
    [pytest.param(190, 190, id="cut-short"), pytest.param(200, 199, id="at-the-end"), (999, 199)],
)
def test_average_near_the_end_of_the_table(start, first):
    """Catches not-a-number from an empty mean where the context is full."""
    rotary = make_rotary(16, 200)
    cos, sin = rotary.average(start, 512)
    np.testing.assert_allclose(torch.cat([cos, sin]), rotary.table[first:].mean(0), atol=1e-6)


@STYLES
def test_inner_products_survive_the_canonical_order(interleaved):
    """Catches keys and moments in different orders."""
    rotary = make_rotary(16, 10, interleaved)
    q, k = torch.randn(2, 5, 1, 24)
    np.testing.assert_allclose(
        (rotary.canonical(q) * rotary.canonical(k)).sum(-1), (q * k).sum(-1), atol=1e-5
    )
