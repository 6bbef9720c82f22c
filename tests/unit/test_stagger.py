"""Which group a new request joins."""

from __future__ import annotations

import pytest

from sglang_vericache.rounds.stagger import assign_group


@pytest.mark.parametrize(
    ("occupied", "groups", "group"),
    [
        pytest.param([], 3, 0, id="first"),
        pytest.param([0], 3, 1, id="second"),
        pytest.param([0, 1, 2], 3, 0, id="tie"),
        pytest.param([0, 0, 1, 2, 2], 3, 1, id="after-some-left"),
        pytest.param([2, 2], 3, 0, id="uneven"),
        pytest.param([0, 0, 0], 1, 0, id="one-group"),
        pytest.param((group for group in (0, 1)), 2, 0, id="from-a-generator"),
    ],
)
def test_joins_the_smallest(occupied, groups, group):
    """Catches groups that fill unevenly, so that one verify pass needs most of the memory."""
    assert assign_group(occupied, groups) == group


def test_groups_stay_even():
    """Catches a bias that only shows with many requests."""
    members: list[int] = []
    for _ in range(50):
        members.append(assign_group(members, 4))
    counts = [members.count(group) for group in range(4)]
    assert max(counts) - min(counts) <= 1
