"""The running requests as the choice of a horizon sees them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Batch:
    """Attributes:
    contexts: committed tokens of each request.
    drafters: places of those that may draft; the others are decoded plainly whatever is chosen.
    agreements: of the drafters.
    shown: whether each drafter's agreement is its own, not the mean of all.
    remaining: tokens that each request may still make.
    without_view: drafters that would have to open a view.
    rotating: for some the full KV is not on the device: plain decoding is no choice, and what
        steps cost is not what limits them.
    token_by_token: some plain request cannot decode several tokens in one step.
    """

    contexts: Sequence[int]
    drafters: Sequence[int]
    agreements: Any
    shown: Any
    remaining: Any
    without_view: int = 0
    rotating: bool = False
    token_by_token: bool = False

    @classmethod
    def of(
        cls,
        contexts: Sequence[int],
        agreements: Sequence[float],
        remaining: Sequence[int] | None = None,
        **more: Any,
    ) -> Batch:
        """All draft, by agreements of their own."""
        count = len(contexts)
        left = [1 << 20] * count if remaining is None else remaining
        values = np.array(agreements, dtype=float)
        return cls(
            contexts, range(count), values, np.ones(count, bool), np.array(left, float), **more
        )

    @property
    def requests(self) -> int:
        return len(self.contexts)
