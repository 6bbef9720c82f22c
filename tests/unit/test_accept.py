"""The acceptance rule: the longest prefix that the full model agrees with, plus its next token."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_vericache.verify.accept import accept_longest_prefix


def oracle(draft: list[int], length: int, target: list[int]) -> int:
    """Plain decoding, told in a loop."""
    accepted = 0
    while accepted < length and draft[accepted] == target[accepted]:
        accepted += 1
    return accepted + 1


def accept(draft: list[list[int]], lengths: list[int], target: list[list[int]]) -> list[int]:
    shape = (len(draft), -1)
    yields = accept_longest_prefix(
        torch.tensor(draft).view(shape), torch.tensor(lengths), torch.tensor(target)
    )
    assert yields.dtype == torch.int64
    return yields.tolist()


@pytest.mark.parametrize(
    ("draft", "length", "target", "yields"),
    [
        pytest.param([5, 6, 7], 3, [1, 6, 7, 8], 1, id="none"),
        pytest.param([5, 6, 7], 3, [5, 1, 7, 8], 2, id="some"),
        pytest.param([5, 6, 7], 3, [5, 6, 1, 8], 3, id="all-but-the-last"),
        pytest.param([5, 6, 7], 3, [5, 6, 7, 8], 4, id="all"),
        pytest.param([5, 6, 7], 3, [5, 1, 7, 7], 2, id="match-after-a-mismatch"),
        pytest.param([5, 6, 7], 2, [5, 6, 7, 8], 3, id="padding-happens-to-match"),
        pytest.param([5, 0, 0], 1, [5, 0, 0, 0], 2, id="padding-of-zeros"),
        pytest.param([5, 6, 7], 1, [1, 6, 7, 8], 1, id="short-and-none"),
        pytest.param([5, 6, 7], 0, [5, 6, 7, 8], 1, id="nothing-drafted"),
        pytest.param([5], 1, [5, 9], 2, id="k1-yes"),
        pytest.param([5], 1, [4, 9], 1, id="k1-no"),
        pytest.param([6, 7, 8], 3, [5, 6, 7, 8], 1, id="shifted-by-one"),
    ],
)
def test_table(draft, length, target, yields):
    """Catches counting matches after the first mismatch, padding taken for drafted tokens, and
    drafted tokens compared with the wrong position."""
    assert accept([draft], [length], [target]) == [yields]
    assert oracle(draft, length, target) == yields


@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_against_the_loop(k):
    """Catches requests of a batch that influence each other. Two possible tokens give every
    length of prefix; the exact rule leaves no tolerance."""
    rng = random.Random(k)
    draft = [[rng.randrange(2) for _ in range(k)] for _ in range(1000)]
    target = [
        [token if rng.random() < 0.9 else 1 - token for token in [*row, rng.randrange(2)]]
        for row in draft
    ]
    lengths = [rng.choice([k, rng.randint(0, k)]) for _ in draft]
    wanted = [oracle(*row) for row in zip(draft, lengths, target, strict=True)]
    assert accept(draft, lengths, target) == wanted
    assert set(wanted) == set(range(1, k + 2)), "the cases above miss a length"


def test_int32_drafts():
    """Catches a comparison that depends on the tensors' own integer types."""
    yields = accept_longest_prefix(
        torch.tensor([[5, 6]], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([[5, 6, 7]], dtype=torch.int64),
    )
    assert yields.tolist() == [3]
