"""When waiting requests are let in: several together where each prefill holds up many. Pure.

Requests of equal length that draft do not end together, as they do without drafting. If each end
lets one request in, there are as many prefills as requests, and during each of them nobody
decodes. Places left empty for a while cost less.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

# Prefills that are looked back on: the shortest of them is what one costs whatever it computes. Of
# more tokens than these it is not told from computing.
PREFILLS, FEW_TOKENS = 8, 1024
# Steps of which one is taken for the usual, by which what a prefill costs is told.
STEPS = 16
# Ends that tell how often one comes, and the fewest that do.
ENDS, FEWEST_ENDS = 32, 4
# Of the running requests' places, at most this part is waited for, and no longer than this.
MOST_PART, MOST_WAIT_S = 1 / 3, 0.5


class Admission:
    """Of one scheduler.

    Attributes:
        held: times that a request which would have fitted was asked to wait.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._prefill: float | None = None  # when it began
        self._few = True
        self._steps_since = 0
        self._step: float | None = None  # when it began, unless a prefill came since
        self._steps: deque[float] = deque(maxlen=STEPS)  # from each to the next one
        self._loading_s = self._launching_s = 0.0
        self._prefills: deque[float] = deque(maxlen=PREFILLS)
        self._ends: deque[float] = deque(maxlen=ENDS)
        self._running = 0
        self._since: float | None = None
        self.held = 0

    def prefill(self, tokens: int, loading_s: float = 0.0) -> None:
        """One of so many tokens begins.

        Args:
            loading_s: what bringing prompts from the host takes at most: it is not saved where
                several of them come together.
        """
        now = self._clock()
        if self._steps_since:
            self._look_back(now)
        self._prefill, self._few = now, tokens <= FEW_TOKENS
        self._step, self._steps_since = None, 0
        self._since, self._loading_s, self._launching_s = None, loading_s, 0.0

    def launched(self) -> None:
        """The prefill's passes are with the device. A host that runs ahead goes on without what
        they wait for, so that the time up to here has no loading in it."""
        if self._prefill is not None:
            self._launching_s = self._clock() - self._prefill

    def step(self, running: int) -> None:
        """A decode step of so many requests begins; none are left where it is for those that
        ended since it was chosen."""
        self._running, now = running, self._clock()
        if not running:
            self._pause()
            return
        if self._prefill is None:
            if self._step is not None:
                self._steps.append(now - self._step)
        elif self._steps_since:
            self._look_back(now)
        else:  # as far as is known by now
            self._steps_since = 1
            if self._few:
                took_s = now - self._prefill
                self._prefills.append(max(took_s - self._loading_s, self._launching_s))
        self._step = now

    def _look_back(self, now: float) -> None:
        """A host that runs ahead goes on while the device still computes a prefill, and waits for
        it a step later: what the step behind it took longer than others."""
        assert self._prefill is not None
        if self._few and self._steps:
            took_s = now - self._prefill - statistics.median(self._steps)
            self._prefills[-1] = max(took_s - self._loading_s, self._launching_s)
        self._prefill, self._steps_since = None, 0

    def ended(self) -> None:
        """A request gives its place back."""
        self._ends.append(self._clock())
        self._running = max(self._running - 1, 0)  # until the next step tells
        if not self._running:
            self._pause()

    def _pause(self) -> None:
        """Nothing may come for a while, which is no step's time."""
        self._prefill, self._step, self._steps_since = None, None, 0

    @property
    def prefill_s(self) -> float:
        """What a prefill costs whatever it computes; 0.0 while none was seen."""
        return min(self._prefills, default=0.0)

    @property
    def together(self) -> int:
        """Requests to be let in at a time.

        With k of them a prefill of P seconds comes once in k ends, each t seconds after the one
        before, and (k - 1) / 2 of n places are empty on the mean: what is lost a second,
        P / (k t) + (k - 1) / (2 n), is least at k = sqrt(2 P n / t).
        """
        if not self._prefills or len(self._ends) < FEWEST_ENDS or not self._running:
            return 1
        apart = (self._clock() - self._ends[0]) / len(self._ends)
        best = math.sqrt(2 * self.prefill_s * self._running / max(apart, 1e-6))
        return max(int(min(best, MOST_PART * self._running)), 1)

    def holds(self, fitting: int, waiting: int) -> bool:
        """Whether the next waiting request is to wait until more of them fit.

        Args:
            fitting: requests like it for which there is memory.
            waiting: it and those behind it.
        """
        if not self._running or not 0 < fitting < min(self.together, waiting):
            self._since = None
            return False
        now = self._clock()
        self._since = self._since if self._since is not None else now
        holds = now - self._since < MOST_WAIT_S
        self.held += holds
        return holds
