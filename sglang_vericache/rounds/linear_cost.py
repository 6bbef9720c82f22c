"""Seconds of one kind of work, learnt from those that were timed. Pure.

They are linear in a few products of batch, context and drafted tokens with coefficients that cannot
be negative, so that a batch is judged by what others took and not by trials of its own. What lies
near something observed is corrected by how far that was from the line: a few requests are slower
than a line through many says, which says nothing of the many.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Kinds of steps that are remembered, half an octave of requests and of context wide, and of each
# the latest durations: the median counts, or one below it, so that a compiled kernel or a garbage
# collection does not.
MOST_KINDS = 256
REMEMBERED = 5
MEDIAN, LOW = 0.5, 0.25
# Observations after which a kind that was not seen again counts half. What all of them count in the
# end, to one just seen: they tell how seconds depend on the batch, not how long it takes now.
HALF_LIFE = 64
LASTING_WEIGHT = 0.1
# Kinds seen less often than this count less: one duration may be of anything.
TRUSTED = 3
# How far what was observed corrects the line: at so many octaves (of drafted tokens, of requests
# and of context together) it weighs 0.6; how much the line itself weighs against a kind that is
# trusted; and the most that a kind corrects, as a factor, before it is.
REACH, LINE_WEIGHT, MOST_CORRECTION = 0.3, 0.05, 3.0
# Observations between two fits, unless one is off by more than this ratio, or few are known.
REFIT_EVERY = 8
SURPRISE = 1.2
FEW = 24
# Pull of every coefficient to zero, of the main one less: where the data leave it open how seconds
# split, work not seen yet is expected to be cheap, so that it is tried and then known.
RIDGE, RIDGE_MAIN = 1e-3, 1e-5


@dataclass(frozen=True, slots=True)
class Work:
    """What a step or a round computes.

    Attributes:
        length: tokens that each request drafts in a round, or decodes in a plain step.
        requests: that take part.
        context: committed tokens of all of them together.
        steps: scheduler steps that a round takes.
    """

    length: int
    requests: int
    context: int
    steps: int = 1


def _place(work: Work) -> tuple[float, float, float]:
    """In octaves."""
    one, two, three = (max(n, 1) for n in (work.length, work.requests, work.context))
    return math.log2(one), math.log2(two), math.log2(three)


class LinearCost:
    """Seconds of one kind of work.

    Args:
        features: of a `Work`; the first is 1.
        quantile: of the latest durations of a kind, the one that counts.
        main: place of the feature that accounts for most of what one kind of steps takes.
    """

    def __init__(self, features: Any, quantile: float = MEDIAN, main: int = 0) -> None:
        self._features, self._quantile, self._main = features, quantile, main
        count = len(features(Work(1, 1, 1)))
        self._slots: dict[tuple[int, ...], int] = {}
        self._latest: list[deque[tuple[float, tuple[float, ...]]]] = []
        self._keys: list[tuple[int, ...]] = []
        self._rows = np.zeros((MOST_KINDS, count))
        self._seconds = np.ones(MOST_KINDS)
        self._stamps = np.zeros(MOST_KINDS)
        self._seen = np.zeros(MOST_KINDS)
        self._places = np.zeros((MOST_KINDS, 3))
        self._off = np.zeros(MOST_KINDS)  # logarithms of duration over line
        self._since_fit = 0
        self.observed = 0
        self.coefficients: tuple[float, ...] = ()

    def observe(self, work: Work, seconds: float) -> None:
        if seconds <= 0 or work.length <= 0 or work.requests <= 0:
            return
        self.observed += 1
        self._since_fit += 1
        expected = self.seconds(work)
        slot = self._slot(work)
        latest = self._latest[slot]
        latest.append((seconds, self._features(work)))
        typical = sorted(latest)[int(self._quantile * (len(latest) - 1))]
        self._seconds[slot], self._rows[slot] = typical
        self._stamps[slot], self._seen[slot] = self.observed, min(self._seen[slot] + 1, TRUSTED)
        off = expected is None or not 1 / SURPRISE < seconds / max(expected, 1e-9) < SURPRISE
        surprised = off and self._since_fit > 1
        if surprised or self.observed <= FEW or self._since_fit >= REFIT_EVERY:
            self._fit()
        self._compare(slot)

    def seconds(self, work: Work) -> float | None:
        """None before anything was observed."""
        if not self.coefficients:
            return None
        return self._fitted(self._features(work)) * self.correction(work)

    def correction(self, work: Work) -> float:
        """Factor of the line where something was observed nearby, 1 elsewhere."""
        count = len(self._latest)
        apart = (self._places[:count] - _place(work)) / REACH
        weights = self._weights() * np.exp(-0.5 * np.einsum("ij,ij->i", apart, apart))
        total = float(weights.sum()) + LINE_WEIGHT
        return math.exp(float(weights @ self._off[:count]) / total)

    def knows(self, work: Work, factor: float, or_larger: bool = False) -> bool:
        """Whether something was observed within ``factor`` in requests and context.

        Args:
            or_larger: or beyond: smaller work is predicted better than larger.
        """
        count = len(self._latest)
        beyond = self._places[:count, 1:] - _place(work)[1:]
        reach = math.log2(factor)
        near = (beyond >= -reach).all(1)
        if not or_larger:
            near &= (beyond <= reach).all(1)
        return bool(near.any())

    def has_seen(self, length: int) -> bool:
        return any(key[0] == length for key in self._keys)

    def _fitted(self, features: Sequence[float]) -> float:
        return sum(c * f for c, f in zip(self.coefficients, features, strict=True))

    def _compare(self, slots: Any) -> None:
        """With the line, those kinds; all of them where the line has changed."""
        line = np.maximum(self._rows[slots] @ np.array(self.coefficients), 1e-9)
        most = np.where(self._seen[slots] < TRUSTED, math.log(MOST_CORRECTION), math.inf)
        self._off[slots] = np.clip(np.log(self._seconds[slots] / line), -most, most)

    def _slot(self, work: Work) -> int:
        place = _place(work)
        key = (work.length, work.steps, *(round(2 * octaves) for octaves in place[1:]))
        slot = self._slots.get(key)
        if slot is not None:
            return slot
        if len(self._latest) < MOST_KINDS:
            slot = len(self._latest)
            self._latest.append(deque(maxlen=REMEMBERED))
            self._keys.append(key)
        else:
            slot = int(self._stamps.argmin())
            del self._slots[self._keys[slot]]
            self._latest[slot].clear()
            self._keys[slot] = key
        self._slots[key] = slot
        self._seen[slot], self._places[slot] = 0, place
        return slot

    def _weights(self, least: float = LASTING_WEIGHT) -> Any:
        """Of the kinds, by when and how often they were seen."""
        count = len(self._latest)
        age = self.observed - self._stamps[:count]
        return np.maximum(0.5 ** (age / HALF_LIFE), least) * self._seen[:count] / TRUSTED

    def _fit(self) -> None:
        """Least squares of relative errors: a short step counts as much as a long one."""
        self._since_fit = 0
        count = len(self._latest)
        weights = self._weights(LASTING_WEIGHT / count)
        weights /= weights.sum()
        relative = self._rows[:count] / self._seconds[:count, None]
        scale = np.sqrt(weights @ relative**2)
        scale[scale == 0] = 1
        scaled = relative / scale
        weighted = scaled * weights[:, None]
        gram = scaled.T @ weighted
        gram[np.diag_indices_from(gram)] += RIDGE
        gram[self._main, self._main] += RIDGE_MAIN - RIDGE
        self.coefficients = tuple((non_negative(gram, weighted.sum(0)) / scale).tolist())
        self._compare(slice(count))


def non_negative(gram: Any, target: Any) -> Any:
    """Minimises x.gram.x / 2 - target.x over x >= 0, for a positive definite ``gram``."""
    solution = np.zeros(len(target))
    free: list[int] = []
    for _ in range(3 * len(target)):
        gradient = target - gram @ solution
        gradient[free] = 0
        best = int(gradient.argmax())
        if gradient[best] <= 1e-9:
            break
        free.append(best)
        while free:
            part = np.linalg.solve(gram[np.ix_(free, free)], target[free])
            if part.min() > 0:
                solution[:] = 0
                solution[free] = part
                break
            # Go as far towards it as nothing turns negative; what is at zero leaves.
            old = solution[free]
            down = part <= 0
            share = (old[down] / (old[down] - part[down])).min()
            solution[free] = old + share * (part - old)
            free = [i for i in free if solution[i] > 1e-12]
    return solution
