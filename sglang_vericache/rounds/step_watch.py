"""How long steps and rounds last, for the question whether rotation pays. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

# What an observation still weighs after the next one.
DECAY = 0.9


class StepWatch:
    """
    Attributes:
        step_s: mean seconds of a scheduler step; 0 until known.
        forward_s: mean seconds of one of its forwards.
        round_s: mean seconds between two verifies of a request that stays attached; None until
            one was verified twice.
        link_rate: tokens/s of the link, as long as no fetch has told.
    """

    def __init__(self, link_rate: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.link_rate, self._clock = link_rate, clock
        self.step_s = self.forward_s = 0.0
        self.round_s: float | None = None
        self._began: float | None = None
        self._forwards = 0
        self._verified: dict[str, float] = {}

    def interrupt(self) -> None:
        """A prefill follows: the time up to the next step says nothing."""
        self._began = None
        self._verified.clear()

    def step(self, verified: Iterable[str], forwards: int) -> None:
        """A step begins that verifies these requests, all of which stay attached.

        Args:
            forwards: passes of the model in it.
        """
        now = self._clock()
        if self._began is not None and self._forwards:
            self.step_s = _mean(self.step_s or None, now - self._began)
            each = (now - self._began) / self._forwards
            self.forward_s = _mean(self.forward_s or None, each)
        self._began, self._forwards = now, forwards
        for rid in verified:
            before = self._verified.get(rid)
            if before is not None:
                self.round_s = _mean(self.round_s, now - before)
            self._verified[rid] = now


def _mean(known: float | None, value: float) -> float:
    return value if known is None else DECAY * known + (1 - DECAY) * value
