"""How long steps and rounds last and what they bring, for the question whether rotation pays.
Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# What an observation still weighs after the next one.
DECAY = 0.9
# Of what a request drafts at most, so much is taken to stand until a verify has told.
ASSUMED_SHARE = 0.5


# Seconds of steps until their rate of tokens counts, what is remembered of them at most, and after
# which nothing is known any more: requests may be others by then.
ENOUGH_S, REMEMBERED_S, STALE_S = 1.0, 3.0, 30.0


@dataclass
class _Rate:
    """Tokens of steps of one kind, the last seconds of them."""

    tokens: float = 0.0
    seconds: float = 0.0
    seen: float = 0.0

    def add(self, tokens: int, seconds: float, now: float) -> None:
        if now - self.seen > STALE_S:
            self.tokens = self.seconds = 0.0
        kept = min(1.0, REMEMBERED_S / (self.seconds + seconds))
        self.tokens, self.seconds = (self.tokens + tokens) * kept, (self.seconds + seconds) * kept
        self.seen = now

    def known(self, now: float) -> float | None:
        if self.seconds < ENOUGH_S or now - self.seen > STALE_S:
            return None
        return self.tokens / self.seconds


class StepWatch:
    """
    Attributes:
        step_s: mean seconds of a scheduler step; 0 until known.
        forward_s: mean seconds of one of its forwards.
        round_s: mean seconds between two turns of a request that stays attached: verifies, or
            plain steps; None until one had two.
        round_tokens: mean tokens of such a turn.
        whole_tokens: mean tokens of a verify of all that a request may draft.
        link_rate: tokens/s of the link, as long as no fetch has told.
    """

    def __init__(
        self, link_rate: float, horizon: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.link_rate, self._clock = link_rate, clock
        self.step_s = self.forward_s = 0.0
        self.round_s: float | None = None
        self.round_tokens: float | None = None
        self.whole_tokens = 1 + ASSUMED_SHARE * horizon
        self._began: float | None = None
        self._forwards = 0
        self._turns: dict[str, tuple[float, int]] = {}  # when, and committed tokens before it
        self._whole: dict[str, int] = {}
        self._before: Mapping[str, int] = {}
        self._kind: bool | None = None
        self._rates = {True: _Rate(), False: _Rate()}

    @property
    def rotation_loses(self) -> bool:
        """While requests rotated, all of them together got fewer tokens a second than while nobody
        did and others waited, as far as both were seen lately."""
        now = self._clock()
        rotating, attached = (self._rates[kind].known(now) for kind in (True, False))
        return rotating is not None and attached is not None and rotating < attached

    def interrupt(self) -> None:
        """A prefill follows: the time up to the next step says nothing."""
        self._began = None
        self._turns.clear()

    def step(
        self,
        committed: Mapping[str, int],
        turns: Iterable[str],
        whole: Iterable[str],
        forwards: int,
        rotating: bool | None = None,
    ) -> None:
        """A step begins.

        Args:
            committed: tokens of each request before it.
            turns: of them, those that stay attached and are verified in it, or decoded plainly.
            whole: those that are verified in it with all that they may draft.
            forwards: passes of the model in it.
            rotating: somebody does; None where nobody does and nobody waits for memory either.
        """
        now = self._clock()
        if self._began is not None and self._kind is not None and self._kind == rotating:
            came = sum(n - self._before[rid] for rid, n in committed.items() if rid in self._before)
            self._rates[rotating].add(came, now - self._began, now)
        self._before, self._kind = committed, rotating
        if self._began is not None and self._forwards:
            self.step_s = _mean(self.step_s or None, now - self._began)
            each = (now - self._began) / self._forwards
            self.forward_s = _mean(self.forward_s or None, each)
        self._began, self._forwards = now, forwards
        for rid, before in self._whole.items():
            if rid in committed:
                self.whole_tokens = _mean(self.whole_tokens, committed[rid] - before)
        self._whole = {rid: committed[rid] for rid in whole}
        for rid in turns:
            if rid in self._turns:
                then, before = self._turns[rid]
                self.round_s = _mean(self.round_s, now - then)
                self.round_tokens = _mean(self.round_tokens, committed[rid] - before)
            self._turns[rid] = now, committed[rid]


def _mean(known: float | None, value: float) -> float:
    return value if known is None else DECAY * known + (1 - DECAY) * value
