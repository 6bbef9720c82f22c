"""A batch on a simulated accelerator, for tests of what chooses horizons.

The host runs a step ahead: while it begins a step, the device still works on the one before, whose
yields come only then; what its phases took is heard of later still. Costs are like those measured
on an H200.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sglang_vericache.rounds.agreement import Agreement, SharedAgreement, expected_yields
from sglang_vericache.rounds.batch import Batch
from sglang_vericache.rounds.controller import MOST_PLAIN_STEPS, PLAIN, HorizonController
from sglang_vericache.rounds.cut import Cut, cut_ahead, cut_evenly
from sglang_vericache.rounds.pace import Choice, Pace
from sglang_vericache.rounds.policy import Candidate, plan_ahead

HORIZONS = (PLAIN, 4, 8, 16)
LONGEST_STEP = 0.03


@dataclass(frozen=True)
class Card:
    """Seconds of what a model does on it.

    Attributes:
        plain, draft, verify: (constant, by request or position, by context).
        lone: what a plain step of a single token costs more.
        part: what each step beyond a round's first costs.
        build: of a view, by token of its context.
        few, dear: rounds of fewer requests than this cost so many times what they should.
        cold: rounds of each horizon before everything that it needs is compiled, each a second.
    """

    plain: tuple[float, float, float]
    draft: tuple[float, float, float]
    verify: tuple[float, float, float]
    lone: float = 0.0
    part: float = 0.0005
    build: float = 1.5e-7
    prefill: float = 0.02
    few: int = 0
    dear: float = 1.0
    cold: int = 0

    def plain_step(self, tokens: int, requests: int, context: int) -> float:
        constant, each, by_context = self.plain
        token = constant + each * requests + by_context * context
        return tokens * token + (self.lone if tokens == 1 else 0)

    def fitting(self, requests: int, context: int) -> int:
        """Tokens of a plain step that is no longer than the pace would make it."""
        token = self.plain_step(MOST_PLAIN_STEPS, requests, context) / MOST_PLAIN_STEPS
        return int(min(max(LONGEST_STEP / 2 // token, 1), MOST_PLAIN_STEPS))

    def cut(self, horizon: int, requests: int, context: int, ahead: bool) -> Cut:
        """As a pace that knows all this would."""
        if not ahead:
            return cut_evenly(horizon, self.round(horizon, requests, context), LONGEST_STEP)
        verify = self.verification(horizon, requests, context)
        return cut_ahead(horizon, verify, self.draft_steps(1, requests, context), LONGEST_STEP)

    def round(self, horizon: int, requests: int, context: int) -> float:
        drafting = self.draft_steps(horizon, requests, context)
        return drafting + self.verification(horizon, requests, context)

    def draft_steps(self, tokens: int, requests: int, context: int) -> float:
        constant, each, by_context = self.draft
        tokens *= self.dear if requests < self.few else 1
        return tokens * (constant + each * requests + by_context * context)

    def verification(self, horizon: int, requests: int, context: int) -> float:
        constant, each, by_context = self.verify
        constant *= self.dear if requests < self.few else 1
        return constant + each * requests * (horizon + 1) + by_context * context


SMALL = Card((1e-3, 0, 7e-9), (0.9e-3, 3e-6, 0.9e-9), (3e-3, 1.2e-6, 9e-9), lone=1e-3)
# As an H200 was found to be: what has just started compiles, and a few requests are dear.
COLD = replace(SMALL, few=12, dear=2.2, cold=2)
# As one was found to be once rounds were drafted ahead.
AHEAD = Card(
    (1.74e-3, 0, 6e-9),
    (0.87e-3, 6.4e-6, 3e-10),
    (2e-3, 7e-7, 7e-9),
    lone=2e-3,
    part=1e-3,
    build=2e-8,
)
LARGE = Card((5.4e-3, 0, 29e-9), (5.4e-3, 0, 5e-9), (6e-3, 8e-6, 50e-9))


@dataclass
class Request:
    context: int
    remaining: int
    truth: float
    agreement: Agreement
    drafted: int = 0
    view: bool = False


@dataclass
class World:
    """Args:
    known: called with the world for the choice; None for the pace's own.
    ahead: the step that verifies a round drafts the first tokens of the next.
    heard: the pace is told what phases took, a step or two later.
    slowdown: factor of all work at a time.
    arrivals: whenever a request ends another follows, after a prefill.
    """

    card: Card
    requests: list[Request]
    pace: Any
    shared: SharedAgreement = field(default_factory=SharedAgreement)
    seed: int = 0
    noise: float = 0.03
    outliers: float = 0.002
    known: Callable[[World], int] | None = None
    ahead: bool = False
    heard: bool = True
    slowdown: Callable[[float], float] = lambda now: 1.0
    arrivals: list[Request] = field(default_factory=list)
    now: float = 0.0
    tokens: int = 0
    builds: int = 0
    chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.finish = 0.0
        self.last = Choice(PLAIN, False, 0)
        self.late: list[tuple[Request, int, int]] = []
        self.cold: Counter[int] = Counter()
        self.timer = random.Random(self.seed + 1)
        self.phases: list[tuple[Callable[[float], None], float]] = []  # of this step
        self.unheard: list[tuple[int, Callable[[float], None], float]] = []
        self.steps_s: list[float] = []

    def batch(self) -> Batch:
        requests = self.requests
        return Batch(
            [r.context for r in requests],
            [r.remaining for r in requests],
            range(len(requests)),
            np.array([r.agreement.value for r in requests if r.agreement.shown]),
            np.array(self.shared.values()),
            sum(not r.view for r in requests),
        )

    def run(self, steps: int | None = None) -> float:
        """Tokens a second, to the end of all requests or over so many steps."""
        began, before = self.now, self.tokens
        while self.requests and (steps is None or steps > 0):
            self.step()
            steps = None if steps is None else steps - 1
        return (self.tokens - before) / (max(self.finish, self.now) - began)

    def step(self) -> None:
        choice = self.choice()
        self.hear()
        seconds, outcome = self.work(choice)
        factor = (1 + self.noise * self.rng.uniform(-1, 1)) * self.slowdown(self.now)
        seconds *= factor
        self.steps_s.append(seconds)
        for told, taken in self.phases:
            due = len(self.steps_s) + self.timer.randint(0, 1)
            taken *= factor * (1 + self.noise * self.timer.uniform(-1, 1))
            self.unheard.append((due, told, taken))
        self.phases = []
        if self.rng.random() < self.outliers:
            seconds += 0.2
        before, self.finish = self.finish, max(self.now, self.finish) + seconds
        self.now = max(self.now + 1e-4, before)
        self.settle(self.late)
        self.late = outcome

    def hear(self) -> None:
        now = len(self.steps_s)
        for due, told, seconds in self.unheard:
            if due <= now:
                told(seconds)
        self.unheard = [one for one in self.unheard if one[0] > now]

    def choice(self) -> Choice:
        if self.known is None:
            return self.pace.begin(self.batch())
        if not self.ahead and any(r.drafted for r in self.requests):
            return self.last
        horizon = self.known(self)
        # Steps are no longer than the pace would make them.
        count, context = len(self.requests), sum(r.context for r in self.requests)
        cut = self.card.cut(horizon, count, context, self.ahead) if horizon else Cut(1, 0, 0)
        fitting = self.card.fitting(count, context)
        self.last = Choice(horizon, False, cut.share, fitting, cut.behind)
        return self.last

    def work(self, choice: Choice) -> tuple[float, list[tuple[Request, int, int]]]:
        """Seconds, and (request, drafted, tokens) of those that come to yield."""
        requests, card = self.requests, self.card
        count, context = len(requests), sum(r.context for r in requests)
        self.chosen.append(choice.horizon)
        if choice.horizon == PLAIN:
            if choice.lasting:
                for request in requests:
                    request.view = False
            for request in requests:
                request.drafted = 0
            self.planned(choice.plain_steps, True)
            seconds = card.plain_step(choice.plain_steps, count, context)
            return seconds, [(r, 0, choice.plain_steps) for r in requests]
        seconds = 0.0
        missing = [r for r in requests if not r.view]
        if missing:
            self.builds += len(missing)
            self.unusual()
            built = card.build * sum(r.context for r in missing)
            self.built(built, sum(r.context for r in missing))
            seconds += built
        for request in missing:
            request.view = True
        if self.ahead:
            more, outcome = self.work_ahead(choice)
            return seconds + more, outcome
        drafting = [min(choice.share, choice.horizon - r.drafted) for r in requests]
        seconds += self.draft(list(enumerate(drafting)))
        if all(r.drafted < choice.horizon for r in requests):
            self.planned(0, False)
            return seconds + card.part, []
        drafted = max(r.drafted for r in requests)
        self.planned(0, True, drafted)
        seconds += self.verify([(i, r.drafted) for i, r in enumerate(requests)])
        outcome = [(r, r.drafted, self.stands(r, r.drafted) + 1) for r in requests]
        for request in requests:
            request.drafted = 0
        return seconds, outcome

    def work_ahead(self, choice: Choice) -> tuple[float, list[tuple[Request, int, int]]]:
        requests = self.requests
        rooms = [max(choice.horizon, r.drafted) for r in requests]
        plan = plan_ahead(
            [
                Candidate(i, True, r.drafted, room, 0, ahead=choice.horizon)
                for i, (r, room) in enumerate(zip(requests, rooms, strict=True))
            ],
            choice.share,
            choice.behind,
        )
        drafting = max((count for _, count in (*plan.draft, *plan.ahead)), default=0)
        drafted = max((count for _, count in plan.verify), default=0)
        self.planned(0, plan.ends_round, drafted, drafting)
        outcome = [
            (requests[i], count, self.stands(requests[i], count) + 1) for i, count in plan.verify
        ]
        seconds = self.verify(plan.verify) if plan.verify else self.card.part
        for i, _ in plan.verify:
            requests[i].drafted = 0
        return seconds + self.draft(plan.draft or plan.ahead), outcome

    def draft(self, work: Sequence[tuple[int, int]]) -> float:
        """Seconds of drafting (place of a request, tokens), which the pace may hear of."""
        for place, tokens in work:
            self.requests[place].drafted += tokens
        context = sum(self.requests[place].context for place, _ in work)
        steps = max((tokens for _, tokens in work), default=0)
        seconds = self.card.draft_steps(steps, len(work), context)
        if self.known is None and self.heard and work:
            self.phases.append((self.pace.drafting(work), seconds))
        return seconds

    def verify(self, work: Sequence[tuple[int, int]]) -> float:
        """The same of verifying (place of a request, tokens drafted)."""
        context = sum(self.requests[place].context for place, _ in work)
        drafted = max(tokens for _, tokens in work)
        self.cold[drafted] += 1
        seconds = float(self.cold[drafted] <= self.card.cold)
        seconds += self.card.verification(drafted, len(work), context)
        if self.known is None and self.heard:
            self.phases.append((self.pace.verifying(work), seconds))
        return seconds

    def stands(self, request: Request, drafted: int) -> int:
        stood = 0
        while stood < drafted and self.rng.random() < request.truth:
            stood += 1
        return stood

    def settle(self, outcome: list[tuple[Request, int, int]]) -> None:
        ended = 0
        for request, drafted, tokens in outcome:
            if request.remaining <= 0:
                continue
            kept = min(tokens, request.remaining)
            self.tokens += kept
            request.remaining -= kept
            request.context += kept
            ended += request.remaining <= 0
            if drafted:
                request.agreement.add(drafted, tokens - 1)
        if outcome:
            self.settled(sum(tokens for *_, tokens in outcome))
        if ended:
            self.requests = [r for r in self.requests if r.remaining > 0]
            arriving, self.arrivals = self.arrivals[:ended], self.arrivals[ended:]
            self.requests += arriving
            self.finish += self.card.prefill * len(arriving)
            if arriving:
                self.unusual()

    # What the pace is told; a test of another pace tells it otherwise.

    def planned(
        self, plain: int, ends: bool, drafted: int = 0, drafting: int | None = None
    ) -> None:
        if self.known is None:
            self.pace.planned(plain, ends, drafted, drafting=drafting)

    def unusual(self) -> None:
        if self.known is None:
            self.pace.unusual()

    def built(self, seconds: float, tokens: int) -> None:
        if self.known is None:
            self.pace.built(seconds, tokens)

    def settled(self, tokens: int) -> None:
        pass


def requests_of(
    count: int,
    context: int,
    seed: int,
    shared: SharedAgreement,
    output: int = 512,
    low: float = 0.5,
    high: float = 0.99,
) -> list[Request]:
    """Agreements between the two, and outputs of up to so many tokens."""
    rng = random.Random(seed)
    return [
        Request(
            context, rng.randint(output // 2, output), rng.uniform(low, high), Agreement(shared)
        )
        for _ in range(count)
    ]


def new_pace(
    world_clock: Callable[[], float], longest_step: float = LONGEST_STEP, ahead: bool = False
) -> Pace:
    return Pace(16, HorizonController(HORIZONS, longest_step, ahead=ahead), world_clock)


def adaptive(
    card: Card, requests: Sequence[Request], pace: Pace | None = None, **more: Any
) -> World:
    """With a pace of its own, or one that has run before."""
    world = World(card, list(requests), None, **more)
    world.pace = pace or new_pace(lambda: world.now, ahead=world.ahead)
    if pace is not None:
        pace._clock = lambda: world.now
        pace.unusual()  # a prefill precedes it
    return world


def true_rates(world: World) -> dict[int, float]:
    """By horizon, builds of missing views spread over what is left."""
    card, requests = world.card, world.requests
    count, context = len(requests), sum(r.context for r in requests)
    left = sum(r.remaining for r in requests)
    missing = sum(r.context for r in requests if not r.view) * card.build
    truths = np.array([r.truth for r in requests])
    fitting = card.fitting(count, context)
    rates = {PLAIN: count * fitting / card.plain_step(fitting, count, context)}
    for horizon in HORIZONS[1:]:
        seconds = card.round(horizon, count, context)
        rate = float(expected_yields(truths, horizon).sum()) / seconds
        rates[horizon] = left / (left / rate + missing)
    return rates


def oracle(world: World) -> int:
    rates = true_rates(world)
    return max(rates, key=lambda horizon: rates[horizon])
