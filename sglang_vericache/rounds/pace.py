"""Times the steps of a batch for the horizon controller. Pure."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.rounds.controller import PLAIN, HorizonController, Load

logger = logging.getLogger(__name__)


@dataclass
class _Step:
    """A step is known when both are: under overlap scheduling the yields come last, else first."""

    load: Load
    horizon: int
    usual: bool = True
    seconds: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Choice:
    """Attributes:
    horizon: most tokens to draft in this step; PLAIN for none.
    lasting: it is the choice, not a trial.
    """

    horizon: int
    lasting: bool


class Pace:
    """A step lasts from its beginning to the next one's.

    Args:
        controller: None keeps to ``horizon``.
    """

    def __init__(
        self,
        horizon: int,
        controller: HorizonController | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.horizon, self.controller, self._clock = horizon, controller, clock
        self._steps: deque[_Step] = deque()
        self._last: _Step | None = None
        self._began = 0.0

    def begin(self, contexts: Sequence[int]) -> Choice:
        """A step over requests of so many committed tokens begins."""
        if self.controller is None:
            return Choice(self.horizon, True)
        now = self._clock()
        if self._last is not None:
            self._last.seconds = now - self._began
        load = Load.of(contexts)
        horizon = self.controller.choose(load)
        self._last, self._began = _Step(load, horizon), now
        self._steps.append(self._last)
        self._report()
        return Choice(horizon, horizon == self.controller.current(load))

    def unusual(self) -> None:
        """This step does what most do not: it builds draft views."""
        if self._last is not None:
            self._last.usual = False

    def interrupt(self) -> None:
        """A prefill follows the last step: how long it took cannot be told."""
        self.unusual()

    def settle(self, tokens: int) -> None:
        """The oldest step that has not settled yielded ``tokens``."""
        if self.controller is None:
            return
        for step in self._steps:
            if step.tokens is None:
                step.tokens = tokens
                break
        self._report()

    def describe(self) -> dict[str, dict[str, float | None]]:
        """Measured tokens a second by load and horizon, for the info endpoint."""
        if self.controller is None:
            return {}
        return {
            f"below {1 << load.requests} requests of {1 << load.context} tokens": {
                str(horizon): rate and round(rate, 1) for horizon, rate in rates.items()
            }
            for load, rates in self.controller.rates().items()
        }

    def _report(self) -> None:
        while self._steps and self.controller is not None:
            step = self._steps[0]
            if step.seconds is None or step.tokens is None:
                break
            self._steps.popleft()
            if step.usual:
                self.controller.observe(step.load, step.horizon, step.seconds, step.tokens)


def horizons_up_to(longest: int) -> tuple[int, ...]:
    """What the controller may choose from."""
    return tuple(sorted({PLAIN, longest // 4, longest // 2, longest}))


def create_pace(config: VeriCacheConfig, on_gpu: bool) -> Pace:
    """As ``config.horizon_policy`` says."""
    policy = config.horizon_policy
    if policy == "fixed" or (policy == "auto" and not on_gpu):
        return Pace(config.horizon, None)
    return Pace(config.horizon, HorizonController(horizons_up_to(config.horizon), _log_switch))


def _log_switch(load: Load, before: int, after: int) -> None:
    logger.info("vericache horizon: %d instead of %d for %s", after, before, load)
