"""Which group a request verifies with. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def assign_group(occupied: Iterable[int], groups: int) -> int:
    """The group with the fewest members among those of the running requests."""
    members = Counter(occupied)
    return min(range(groups), key=lambda group: (members[group], group))
