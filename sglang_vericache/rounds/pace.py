"""Times the steps of a batch, for the horizon controller and for the length of a step. Pure."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.rounds.controller import PLAIN, HorizonController, Load

logger = logging.getLogger(__name__)

# Plain steps in one scheduler step: the scheduler's own work is spread over so many tokens, and
# that many may be computed in vain behind the end of an output.
MOST_PLAIN_STEPS = 8
# A round is drafted in at most so many steps.
MOST_PARTS = 4
# Durations that count; their median does.
REMEMBERED = 5


@dataclass
class _Step:
    """A step is known when both are: under overlap scheduling the yields come last, else first.

    Attributes:
        plain_steps: tokens that every request decodes plainly; 0 when some request drafts.
        ends_round: tokens drafted so far are verified in it, or there are none.
        whole: it may draft a whole round.
    """

    load: Load
    horizon: int
    whole: bool
    usual: bool = True
    plain_steps: int = 0
    ends_round: bool = True
    seconds: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Choice:
    """Attributes:
    horizon: most tokens to draft in this round; PLAIN for none.
    lasting: it is the choice, not a trial.
    share: most tokens to draft in this step.
    plain_steps: tokens to decode plainly in this step where nothing drafts.
    """

    horizon: int
    lasting: bool
    share: int
    plain_steps: int = 1


class _Durations:
    """Seconds by what took them."""

    def __init__(self) -> None:
        self._latest: defaultdict[Hashable, deque[float]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED)
        )

    def add(self, key: Hashable, seconds: float) -> None:
        self._latest[key].append(seconds)

    def usual(self, key: Hashable) -> float | None:
        """Their median, or None before there are two: the first may be of anything."""
        latest = self._latest.get(key, ())
        return statistics.median(latest) if len(latest) > 1 else None


class Pace:
    """A step lasts from its beginning to the next one's.

    Args:
        controller: None keeps to ``horizon``, a whole round and one plain token a step.
        longest_step: seconds that a step should last at most: a longer round is drafted in
            several, and so many plain steps are taken in one.

    Attributes:
        rounds_in_parts: steps that drafted and left the verification to a later one.
        plain_together: steps that decoded several plain tokens of each request.
    """

    def __init__(
        self,
        horizon: int,
        controller: HorizonController | None,
        longest_step: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.horizon, self.controller = horizon, controller
        self.longest_step, self._clock = longest_step, clock
        self._steps: deque[_Step] = deque()
        self._last: _Step | None = None
        self._began = 0.0
        self._choice = Choice(horizon, True, horizon)
        self.rounds_in_parts = self.plain_together = 0
        self._plain_seconds, self._round_seconds = _Durations(), _Durations()
        # Of the round whose steps are being reported.
        self._seconds, self._tokens, self._usual = 0.0, 0, True

    def begin(self, contexts: Sequence[int]) -> Choice:
        """A step over requests of so many committed tokens begins."""
        if self.controller is None:
            return self._choice
        now = self._clock()
        if self._last is not None:
            self._last.seconds = now - self._began
            self._report()
        load = Load.of(contexts)
        if self._last is None or self._last.ends_round:
            self._choice = self._choose(load)
        else:
            load = self._last.load  # of the round, which goes on
        whole = self._choice.share >= self._choice.horizon
        self._last, self._began = _Step(load, self._choice.horizon, whole), now
        self._steps.append(self._last)
        return self._choice

    def planned(self, plain_steps: int, ends_round: bool) -> None:
        """What the step that just began does; see `_Step`."""
        self.rounds_in_parts += not ends_round
        self.plain_together += plain_steps > 1
        if self._last is not None:
            self._last.plain_steps, self._last.ends_round = plain_steps, ends_round
            if plain_steps:
                self._last.horizon = PLAIN  # nobody could draft, whatever was chosen

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

    def _choose(self, load: Load) -> Choice:
        assert self.controller is not None
        horizon = self.controller.choose(load)
        whole = self._round_seconds.usual((load, horizon)) or 0.0
        steps = min(max(math.ceil(whole / self.longest_step), 1), MOST_PARTS)
        plain = self._plain_seconds.usual(load)
        fitting = 1 if plain is None else int(self.longest_step / 2 / max(plain, 1e-6))
        return Choice(
            horizon,
            horizon == self.controller.current(load),
            share=math.ceil(horizon / steps),
            plain_steps=min(max(fitting, 1), MOST_PLAIN_STEPS),
        )

    def _report(self) -> None:
        while self._steps and self.controller is not None:
            step = self._steps[0]
            if step.seconds is None or step.tokens is None:
                break
            self._steps.popleft()
            self._seconds += step.seconds
            self._tokens += step.tokens
            self._usual &= step.usual
            if step.ends_round:
                self._report_round(step)
                self._seconds, self._tokens, self._usual = 0.0, 0, True

    def _report_round(self, last: _Step) -> None:
        if not self._usual:
            return
        if last.plain_steps:
            known = self._plain_seconds.usual(last.load) is not None
            self._plain_seconds.add(last.load, self._seconds / last.plain_steps)
            if not known:
                return  # one token a step: how fast several are is what counts
        elif last.whole:
            # Not of rounds in parts: where the host is what takes time, parts take more of it, and
            # would ask for more parts.
            self._round_seconds.add((last.load, last.horizon), self._seconds)
        assert self.controller is not None
        self.controller.observe(last.load, last.horizon, self._seconds, self._tokens)


def horizons_up_to(longest: int) -> tuple[int, ...]:
    """What the controller may choose from."""
    return tuple(sorted({PLAIN, longest // 4, longest // 2, longest}))


def create_pace(config: VeriCacheConfig, on_gpu: bool) -> Pace:
    """As ``config.horizon_policy`` says."""
    policy = config.horizon_policy
    if policy == "fixed" or (policy == "auto" and not on_gpu):
        return Pace(config.horizon, None)
    controller = HorizonController(horizons_up_to(config.horizon), _log_switch)
    return Pace(config.horizon, controller, config.max_step_seconds)


def _log_switch(load: Load, before: int, after: int) -> None:
    logger.info("vericache horizon: %d instead of %d for %s", after, before, load)
