"""What plain steps and rounds cost, and opening draft views. Pure.

Whole rounds do not tell drafting from verifying: their batches hardly change while their horizon
does not at all, so that a line through them may put everything into either, and the horizons that
do not run are misjudged. Both are therefore timed by themselves, and of whole rounds only the rest
is learnt.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np

from sglang_vericache.rounds.linear_cost import LOW, LinearCost, Work, non_negative

TOKEN = 1  # place of a token in the features of a plain step
# Where steps of several plain tokens are looked up for what one of these adds.
SOME_PLAIN_TOKENS = 4
# Whole rounds after which one counts half for the rest, and what pulls its coefficients to zero, in
# rounds; the constant one less, as in `linear_cost`.
REST_HALF_LIFE, REST_RIDGE, REST_RIDGE_CONSTANT = 32, 0.1, 1e-3
# Of what hardly changes from round to round, draft steps and the rest, every round is learnt of at
# first and then one in so many: each takes the host some 0.1 ms.
FIRST_ROUNDS, THINNED = 64, 4


def plain_features(work: Work) -> tuple[float, ...]:
    """A plain step: the scheduler's own work, then each token."""
    n = work.length
    return (1.0, n, n * work.requests, n * work.context)


def draft_features(work: Work) -> tuple[float, ...]:
    """A draft step."""
    return (1.0, work.requests, work.context)


def verify_features(work: Work) -> tuple[float, ...]:
    return (1.0, work.requests * (work.length + 1), work.context)


def round_features(work: Work) -> tuple[float, ...]:
    """A round: draft steps, one verification, and the steps beyond the first."""
    h, b, k = work.length, work.requests, work.context
    return (1.0, h, h * b, h * k, b * (h + 1), k, work.steps - 1)


def rest_features(work: Work) -> tuple[float, ...]:
    """What is neither: the scheduler's work where the device waits for it, and commits."""
    return (1.0, work.requests, work.steps - 1)


def is_learnt(round_number: int) -> bool:
    return round_number <= FIRST_ROUNDS or round_number % THINNED == 0


class Rest:
    """Seconds of a round beside its parts. These are predicted, not those of that round: they come
    later than the round ends, and of a device that lags behind by a step."""

    def __init__(self) -> None:
        count = len(rest_features(Work(1, 1, 1)))
        self._gram, self._target = np.zeros((count, count)), np.zeros(count)
        self.coefficients: tuple[float, ...] = ()

    def observe(self, work: Work, seconds: float, parts: float) -> None:
        """Least squares of what is relative to the whole round, with a memory that fades: a pause,
        far longer than all, counts little. Parts that took less than predicted count against it,
        so that noise does not make a rest."""
        row = np.array(rest_features(work)) / seconds
        fade = 0.5 ** (1 / REST_HALF_LIFE)
        self._gram = fade * self._gram + np.outer(row, row)
        self._target = fade * self._target + row * (1 - parts / seconds)
        scale = np.sqrt(np.diag(self._gram))
        scale[scale == 0] = 1
        gram = self._gram / np.outer(scale, scale)
        gram[np.diag_indices_from(gram)] += REST_RIDGE / REST_HALF_LIFE
        gram[0, 0] -= (REST_RIDGE - REST_RIDGE_CONSTANT) / REST_HALF_LIFE
        self.coefficients = tuple((non_negative(gram, self._target / scale) / scale).tolist())

    def seconds(self, work: Work) -> float:
        return sum(c * f for c, f in zip(self.coefficients, rest_features(work), strict=False))


class RoundCosts:
    """Of rounds as a whole, and of what they consist of.

    Attributes:
        drafts: of a draft step, a `Work` of one token; verifies: of verifying what was drafted.
        whole: of rounds; they count where nothing was heard of either part.
    """

    def __init__(self) -> None:
        # The first of a trial are heard of although they compile: most of the few that it sees.
        self.drafts = LinearCost(draft_features, LOW)
        self.verifies = LinearCost(verify_features, LOW)
        self.rest, self.whole = Rest(), LinearCost(round_features)
        self._asked = (0, 0, 0)  # and found, the last draft step: the same for all horizons
        self._step: float | None = None

    def observe(self, work: Work, seconds: float) -> None:
        """A whole round."""
        self.whole.observe(work, seconds)
        if is_learnt(self.whole.observed):
            parts = self._parts(work)
            if parts is not None and seconds > 0:
                self.rest.observe(work, seconds, parts)

    def seconds(self, work: Work) -> float | None:
        """None before anything was observed."""
        parts = self._parts(work)
        return self.whole.seconds(work) if parts is None else parts + self.rest.seconds(work)

    def draft_step(self, requests: int, context: int) -> float | None:
        """The same of one draft step, None before one was told."""
        asked = (requests, context, self.drafts.observed)
        if asked != self._asked:
            self._asked, self._step = asked, self.drafts.seconds(Work(1, requests, context))
        return self._step

    def knows(self, work: Work, factor: float, or_larger: bool = False) -> bool:
        """As `LinearCost.knows`, of whole rounds."""
        return self.whole.knows(work, factor, or_larger)

    def has_seen(self, length: int) -> bool:
        return self.whole.has_seen(length)

    def _parts(self, work: Work) -> float | None:
        step, verify = self.draft_step(work.requests, work.context), self.verifies.seconds(work)
        return None if step is None or verify is None else work.length * step + verify


class Costs:
    """Of plain steps, of rounds, and of opening draft views."""

    # Per token of a view's context. Until enough was seen it costs no more than this: the first
    # builds may compile kernels, and views that seem too dear would never be opened again.
    FIRST_BUILD_SECONDS = 5e-7
    ENOUGH_BUILDS = 3

    def __init__(self) -> None:
        # A first plain step says what a token takes: with all of it in the scheduler's work, as
        # many tokens as may be would seem to fit into the next one.
        self.plain, self.rounds = LinearCost(plain_features, main=TOKEN), RoundCosts()
        self._builds: deque[float] = deque(maxlen=15)

    def observe_build(self, seconds: float, tokens: int) -> None:
        """Views of so many tokens of context were opened."""
        if tokens > 0:
            self._builds.append(max(seconds, 0.0) / tokens)

    def build_seconds(self, tokens: float) -> float:
        """Of views of so many tokens of context."""
        each = statistics.median_low(self._builds) if self._builds else self.FIRST_BUILD_SECONDS
        if len(self._builds) < self.ENOUGH_BUILDS:
            each = min(each, self.FIRST_BUILD_SECONDS)
        return each * tokens

    def token_seconds(self, requests: int, context: int) -> float:
        """What a plain token of each of so many requests adds to a step; 0.0 if unknown."""
        if not requests or not self.plain.coefficients:
            return 0.0
        _, token, by_request, by_context = self.plain.coefficients
        line = token + by_request * requests + by_context * context
        return line * self.plain.correction(Work(SOME_PLAIN_TOKENS, requests, context))

    def describe(self) -> dict[str, Sequence[float] | float]:
        """Coefficients, for the info endpoint."""
        return {
            "plain_s": self.plain.coefficients,
            "round_s": self.rounds.whole.coefficients,
            "draft_s": self.rounds.drafts.coefficients,
            "verify_s": self.rounds.verifies.coefficients,
            "rest_s": self.rounds.rest.coefficients,
            "build_s_per_token": self.build_seconds(1),
        }
