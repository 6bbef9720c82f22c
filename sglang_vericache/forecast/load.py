"""What a forecast is of: the requests, and how drafting goes. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from sglang_vericache.config import AUTO, VeriCacheConfig
from sglang_vericache.loader.planner import PathPart
from sglang_vericache.rounds.agreement import expected_yields
from sglang_vericache.rounds.controller import PLAIN

# Multiples of it, but for their whole part, are evenly spread.
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Load:
    """Requests that come all at once.

    Attributes:
        context, output: tokens of each.
        prefixes: groups that share ``shared`` tokens of their context; 0 when nobody shares.
    """

    requests: int
    context: int
    output: int
    prefixes: int = 0
    shared: int = 0

    def path_of(self, number: int) -> tuple[PathPart, ...]:
        if not self.prefixes:
            return (PathPart(number, self.context),)
        group = number * self.prefixes // self.requests  # one after the other
        own = max(self.context - self.shared, 1)
        return (PathPart(-1 - group, self.shared), PathPart(number, own))


@dataclass(frozen=True)
class Draft:
    """How drafting goes.

    Attributes:
        horizon: tokens drafted in a round.
        yields: tokens that a round brings, the full model's own included.
        kept: share of the KV bytes that a draft reads.
        spread: standard deviation of requests' yields, as a share of the mean: requests of equal
            length do not end together.
        admits_together, brings_prompts: as the server does (rounds/admission.py, prompt_fetch.py).
    """

    horizon: int = VeriCacheConfig.horizon
    yields: float = 10.0
    kept: float = 0.1
    spread: float = 0.1
    admits_together: bool = True
    brings_prompts: bool = True

    @property
    def horizons(self) -> frozenset[int]:
        """That the controller chooses from."""
        return frozenset({PLAIN, self.horizon // 4, self.horizon // 2, self.horizon})

    @cached_property
    def deepest(self) -> int:
        """Tokens that a request drafts while it waits for its full KV."""
        return VeriCacheConfig(horizon=self.horizon, offload=AUTO).deepest

    @cached_property
    def agreement(self) -> float:
        """The chance of each drafted token with which a horizon brings ``yields``."""
        low, high = 0.0, 1 - 1e-9
        for _ in range(30):
            chance = (low + high) / 2
            if expected_yields(chance, self.horizon) < self.yields:
                low = chance
            else:
                high = chance
        return high

    def tokens(self, drafted: int) -> float:
        """That a round of so many drafted tokens brings."""
        return float(expected_yields(self.agreement, drafted))

    def fortune(self, number: int) -> float:
        """What a request's yields are multiplied by: evenly spread, in no order."""
        place = (number + 1) * GOLDEN % 1.0
        return 1 + self.spread * math.sqrt(12) * (place - 0.5)


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        tokens_per_s: output tokens from the beginning to the last one.
        together: most requests that ran at a time.
        link_use: share of the time in which the link was busy.
        slowest: seconds of the slowest request by those of the median one.
        detached: times that a running request's full KV left the device.
    """

    tokens_per_s: float
    together: int
    link_use: float = 0.0
    slowest: float = 1.0
    detached: int = 0
