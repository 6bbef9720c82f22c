"""Which horizon is worth drafting, plain decoding included. Pure.

Nothing is modelled: each horizon is tried for a few steps and the batch's own tokens a second
decide. What they depend on besides, the number of requests and the length of their contexts, is
coarse enough for every combination to be tried early and rarely again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PLAIN = 0
# A switch costs views and graphs their warmth: what is not clearly better is not worth it.
MARGIN = 1.05
TRIAL_STEPS = 4
# Steps of a trial that may go unobserved: the first builds draft views where nobody drafted before,
# and the first plain ones tell how many of them fit into a step.
SPARE_STEPS = 2
# Steps before a horizon that lost is tried again; each further loss doubles them.
FIRST_RETRY, LONGEST_RETRY = 128, 8192
# A choice whose speed falls to this share of what it was is questioned at once.
FALL = 0.7
# Steps that a trial's results may be late before it is taken up again, as a whole: meanwhile the
# choice may have closed the draft views. After so many times it ends with what was seen.
PATIENCE = 16
MOST_RESUMED = 2
# Observations that count, and the share of them, the slowest, that does not: a kernel compiled,
# a garbage collection or a neighbour's work says nothing about a horizon.
REMEMBERED = 12
OUTLIERS = 0.25


@dataclass(frozen=True)
class Load:
    """What speeds depend on, in powers of two.

    Attributes:
        requests, context: bit lengths of the requests running and of their mean context.
    """

    requests: int
    context: int

    @classmethod
    def of(cls, contexts: Sequence[int]) -> Load:
        count = len(contexts)
        return cls(count.bit_length(), (sum(contexts) // max(count, 1)).bit_length())

    def distance(self, other: Load) -> int:
        return abs(self.requests - other.requests) + abs(self.context - other.context)


@dataclass
class _Speed:
    """The latest observations of one horizon under one load."""

    observed: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    retry: int = FIRST_RETRY
    due: int = 0

    @property
    def rate(self) -> float | None:
        by_speed = sorted(self.observed, key=lambda seen: seen[0] / max(seen[1], 1))
        kept = by_speed[: len(by_speed) - int(len(by_speed) * OUTLIERS)]
        seconds = sum(seconds for seconds, _ in kept)
        return sum(tokens for _, tokens in kept) / seconds if seconds > 0 else None

    def add(self, seconds: float, tokens: int) -> None:
        self.observed.append((seconds, tokens))


@dataclass
class _LoadState:
    speeds: dict[int, _Speed]
    current: int
    step: int = 0
    trial: int | None = None
    left: int = 0
    seen: int = 0
    waited: int = 0
    resumed: int = 0
    reference: float = 0.0
    queue: list[int] = field(default_factory=list)


class HorizonController:
    """Chooses the horizon of each step.

    Args:
        horizons: ascending; PLAIN among them where plain decoding may win.
        on_switch: told (load, from, to) when another horizon becomes the choice.
    """

    def __init__(
        self,
        horizons: Sequence[int],
        on_switch: Callable[[Load, int, int], None] = lambda *_: None,
    ) -> None:
        self.horizons, self.on_switch = tuple(horizons), on_switch
        self._loads: dict[Load, _LoadState] = {}

    def choose(self, load: Load) -> int:
        """The horizon of the next step."""
        state = self._loads.get(load)
        if state is None:
            state = self._loads[load] = self._enter(load)
        state.step += 1
        if state.trial is None:
            self._start_trial(state)
        if state.trial is None:
            return state.current
        if state.left == 0:
            # Its last steps may not have been observed yet: results come late, or never for a
            # step that a prefill followed.
            state.waited += 1
            if state.waited <= PATIENCE:
                return state.current
            if state.resumed == MOST_RESUMED:
                self._end_trial(load, state, state.trial)
                return state.current
            state.left, state.waited = TRIAL_STEPS + SPARE_STEPS, 0
            state.resumed += 1
        state.left -= 1
        return state.trial

    def current(self, load: Load) -> int:
        """The choice, whatever is being tried."""
        return self._loads[load].current

    def observe(self, load: Load, horizon: int, seconds: float, tokens: int) -> None:
        """A step under ``load`` took ``seconds`` and yielded ``tokens``, all requests together."""
        state = self._loads.get(load)
        if state is None or horizon not in state.speeds:
            return
        state.speeds[horizon].add(seconds, tokens)
        if state.trial == horizon:
            state.seen += 1
            if state.seen >= TRIAL_STEPS:
                self._end_trial(load, state, horizon)
        elif horizon == state.current and state.trial is None:
            self._watch(state)

    def rates(self) -> dict[Load, dict[int, float | None]]:
        """Tokens a second by load and horizon, None where not measured."""
        return {
            load: {horizon: speed.rate for horizon, speed in state.speeds.items()}
            for load, state in self._loads.items()
        }

    def _enter(self, load: Load) -> _LoadState:
        """Begin with the choice of the nearest load; the others are tried one after the other."""
        known = min(self._loads, key=load.distance, default=None)
        current = self.horizons[-1] if known is None else self._loads[known].current
        state = _LoadState({horizon: _Speed() for horizon in self.horizons}, current)
        if known is None:
            state.queue = [current, *(h for h in self.horizons if h != current)]
        else:
            # A batch that shrinks passes through many loads: one that does not stay is not
            # explored beyond its choice.
            state.queue = [current]
            for n, horizon in enumerate(h for h in self.horizons if h != current):
                state.speeds[horizon].due = (n + 2) * 2 * TRIAL_STEPS
        return state

    def _start_trial(self, state: _LoadState) -> None:
        if not state.queue:
            due = [
                horizon
                for horizon, speed in state.speeds.items()
                if horizon != state.current and speed.due <= state.step
            ]
            if not due:
                return
            state.queue = [min(due, key=lambda horizon: state.speeds[horizon].due)]
        state.trial = state.queue.pop(0)
        state.left, state.seen, state.waited, state.resumed = TRIAL_STEPS + SPARE_STEPS, 0, 0, 0
        speed = state.speeds[state.trial]
        if state.trial != state.current:
            speed.observed.clear()  # old figures would outweigh the new ones

    def _end_trial(self, load: Load, state: _LoadState, tried: int) -> None:
        state.trial = None
        current, speed = state.speeds[state.current], state.speeds[tried]
        if tried == state.current:
            return
        known, found = current.rate, speed.rate
        if known is not None and found is not None and found > known * MARGIN:
            before, state.current, state.reference = state.current, tried, 0.0
            current.retry, current.due = FIRST_RETRY, state.step + FIRST_RETRY
            self.on_switch(load, before, tried)
        else:
            speed.due = state.step + speed.retry
            speed.retry = min(2 * speed.retry, LONGEST_RETRY)

    def _watch(self, state: _LoadState) -> None:
        rate = state.speeds[state.current].rate
        if rate is None:
            return
        state.reference = max(state.reference, rate)
        if rate < FALL * state.reference:
            state.reference = rate
            for horizon, speed in state.speeds.items():
                if horizon != state.current:
                    speed.retry, speed.due = FIRST_RETRY, state.step
