"""Which horizon is worth drafting, plain decoding included. Pure.

Each step is predicted: seconds by what steps cost (`costs`), tokens by how each request has agreed
so far (`agreement`). Trials are for what nothing was observed of, or only far away or long ago.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sglang_vericache.rounds.batch import Batch
from sglang_vericache.rounds.costs import Costs
from sglang_vericache.rounds.cut import Cut, cut_ahead, cut_evenly
from sglang_vericache.rounds.linear_cost import Work

PLAIN = 0
# What is not clearly better is not worth a switch.
MARGIN = 1.05
# Draft views are opened for what is better by this: what they cost is paid at once, and what they
# bring comes while the batch shrinks.
OPENING_MARGIN = 1.15
# Plain decoding closes the views when it has been better by this much for so many steps: opening
# them again costs what several rounds do.
CLOSING_MARGIN, CLOSING_STEPS = 1.15, 16
# Plain steps in one scheduler step: the scheduler's own work is spread over so many tokens, and
# that many may be computed in vain behind the end of an output.
MOST_PLAIN_STEPS = 8
# A trial ends with so many observations, or after so many rounds: prefills may follow all of them.
TRIAL_OBSERVATIONS, TRIAL_ROUNDS = 2, 6
MOST_TRIALS = 3
# Costs observed within this factor of requests and of context are known.
NEAR = 4.0
# Rounds without an observation of the other kind until it is checked; each check that does not
# turn the choice doubles them. And rounds between any two checks.
FIRST_CHECK, LONGEST_CHECK = 2048, 32768
BETWEEN_CHECKS = 64
# Rounds until another horizon that is predicted to reach the choice's rate within the factor is
# drafted again: what was first observed of it may have been of a device that compiled. Each time
# that does not turn the choice doubles them.
FIRST_RETRY, LONGEST_RETRY, WITHIN = 512, 16384, 1.25
# Nothing is tried where requests have fewer tokens left than this on the mean.
WORTH_TRYING = 64
# The other kind is not checked where it seems slower by more than this: when its costs were
# observed nearby, and when they were not.
HOPELESS, HOPELESS_UNKNOWN = 1.5, 3.0
# Rounds without a plain step until plain decoding is checked if it is thought to be slower by more
# than this factor than verifying says it can be: what was observed may have been of a device that
# compiled. Each check that does not turn the choice doubles them.
DOUBTFUL, FIRST_DOUBT = 1.5, 64
# Requests of which nothing is known may agree so well: nothing would be learnt of new texts if
# drafting stayed closed because of earlier ones.
HOPED_AGREEMENT = 0.95


@dataclass
class _Trial:
    horizon: int
    rounds: int = 0
    observed: int = 0


class HorizonController:
    """Chooses the horizon of each round.

    Args:
        horizons: ascending; PLAIN among them where plain decoding may win.
        longest_step: seconds that a step should last at most.
        ahead: rounds are drafted in the step that verifies the one before.
        on_switch: told (from, to, batch) when another horizon becomes the choice.
    """

    def __init__(
        self,
        horizons: Sequence[int],
        longest_step: float = float("inf"),
        on_switch: Callable[[int, int, Batch], None] = lambda *_: None,
        costs: Costs | None = None,
        ahead: bool = False,
    ) -> None:
        self.horizons, self.longest_step, self.on_switch = tuple(horizons), longest_step, on_switch
        self.costs, self.ahead = costs or Costs(), ahead
        self.current = self.horizons[-1]
        self._trial: _Trial | None = None
        drafting = [horizon for horizon in reversed(self.horizons) if horizon != PLAIN]
        self._unknown = (drafting + [h for h in self.horizons if h == PLAIN]) * MOST_TRIALS
        self._round = 0
        self._observed = {True: 0, False: 0}  # by whether plain: the round of the last
        self._wait = {True: FIRST_CHECK, False: FIRST_CHECK}
        self._doubt, self._doubts = FIRST_DOUBT, False  # whether the check under way is out of it
        self._next_check = 0
        self._drafted: dict[int, int] = {}  # by horizon: the round of the last
        self._retry: dict[int, int] = {}
        self._checking = False
        self._pause = BETWEEN_CHECKS
        self._closing = 0

    def choose(self, batch: Batch) -> int:
        """The horizon of the next round."""
        if not batch.drafters:
            return self.current or self.horizons[-1]
        self._round += 1
        if batch.rotating:
            return self._choose_rotating(batch)
        self._end_trial()
        if self._trial is None:
            rates = self.rates(batch)
            self._decide(rates, batch)
            self._trial = self._next_trial(rates, batch)
        if self._trial is not None:
            self._trial.rounds += 1
            self._closing = 0
            return self._trial.horizon
        return self.current

    @property
    def closes_views(self) -> bool:
        """Plain decoding has been clearly better for long enough."""
        return self._closing >= CLOSING_STEPS

    def observe_round(self, work: Work, seconds: float) -> None:
        self.costs.rounds.observe(work, seconds)
        self._saw(False, work.length)

    def observe_plain(self, work: Work, seconds: float) -> None:
        self.costs.plain.observe(work, seconds)
        self._saw(True, PLAIN)

    def plain_steps(self, batch: Batch) -> int:
        """Tokens of each request that fit into a step where nothing drafts."""
        token = self.costs.token_seconds(batch.requests, batch.context)
        if not token or batch.token_by_token:
            return 1
        return self._fitting(token)

    def _fitting(self, token: float) -> int:
        return int(min(max(self.longest_step / 2 / token, 1), MOST_PLAIN_STEPS))

    def cut(self, horizon: int, batch: Batch) -> Cut:
        """Steps in which a round is drafted, so that none is too long."""
        found = self._predicted(horizon, batch)
        return Cut(1, horizon, horizon) if found is None else found[0]

    def rates(self, batch: Batch, hoped: float | None = None) -> dict[int, float]:
        """Predicted tokens a second by horizon, of those whose costs are known at all.

        Builds of missing views are spread over what the batch may still make.

        Args:
            hoped: agreement of those that have not drafted yet.
        """
        rates = {}
        for horizon in self.horizons:
            seconds = self.seconds(horizon, batch)
            if not seconds:
                continue
            if horizon == PLAIN:
                rates[horizon] = batch.requests * self.plain_steps(batch) / seconds
                continue
            rate = batch.tokens(horizon, hoped) / seconds
            build = self.costs.build_seconds(batch.tokens_without_view)
            rates[horizon] = batch.left / (batch.left / rate + build)
        return rates

    def seconds(self, horizon: int, batch: Batch) -> float | None:
        """Predicted, of a round or of a plain step."""
        if horizon == PLAIN:
            work = Work(self.plain_steps(batch), batch.requests, batch.context)
            return self.costs.plain.seconds(work)
        found = self._predicted(horizon, batch)
        if found is None:
            return None
        cut, seconds = found
        beside = self.costs.token_seconds(batch.undrafted, batch.context - batch.drafting_context)
        return seconds + cut.steps * beside

    def _predicted(self, horizon: int, batch: Batch) -> tuple[Cut, float] | None:
        """A round, without what is decoded plainly beside it."""
        work = Work(horizon, len(batch.drafters), batch.drafting_context)
        rounds = self.costs.rounds
        whole = rounds.seconds(work) if horizon != PLAIN and work.requests else None
        if whole is None:
            return None
        ahead = self.ahead and not batch.rotating
        draft = rounds.draft_step(work.requests, work.context) if ahead else None
        if draft is None:
            cut = cut_evenly(horizon, whole, self.longest_step)
        else:
            cut = cut_ahead(horizon, whole - horizon * draft, draft, self.longest_step)
        if cut.steps == 1:
            return cut, whole
        return cut, rounds.seconds(replace(work, steps=cut.steps)) or whole

    def _choose_rotating(self, batch: Batch) -> int:
        rates = {h: rate for h, rate in self.rates(batch).items() if h != PLAIN}
        return max(rates, key=lambda h: rates[h]) if len(rates) > 1 else self.horizons[-1]

    def _decide(self, rates: dict[int, float], batch: Batch) -> None:
        known = rates.get(self.current)
        if known is None:
            return
        best = max(rates, key=lambda horizon: rates[horizon])
        margin = MARGIN
        if 2 * batch.without_view > len(batch.drafters) and PLAIN in rates:
            if self.current == PLAIN:
                margin = OPENING_MARGIN
            elif rates[best] < OPENING_MARGIN * rates[PLAIN]:
                best, margin = PLAIN, 0.0
        if best != self.current and rates[best] > margin * known and self._ventures(best, batch):
            before, self.current = self.current, best
            self._retry.clear()
            if (best == PLAIN) != (before == PLAIN):
                self._closing = 0
                self._wait = {True: FIRST_CHECK, False: FIRST_CHECK}
                self._doubt = FIRST_DOUBT
            self.on_switch(before, best, batch)
        if self.current == PLAIN:
            drafting = max((rates[h] for h in rates if h != PLAIN), default=None)
            better = drafting is not None and rates[PLAIN] > CLOSING_MARGIN * drafting
            self._closing = self._closing + 1 if better else 0
        else:
            self._closing = 0

    def _ventures(self, horizon: int, batch: Batch) -> bool:
        """Nothing that was never observed nearby is begun where little is left."""
        if self.current != PLAIN or batch.left_each >= WORTH_TRYING:
            return True
        work = Work(horizon, len(batch.drafters), batch.drafting_context)
        return self.costs.rounds.knows(work, NEAR)

    def _next_trial(self, rates: dict[int, float], batch: Batch) -> _Trial | None:
        while self._unknown:
            horizon = self._unknown.pop(0)
            if not self._knows(horizon):
                return _Trial(horizon)
        if self._round < self._next_check or PLAIN not in self.horizons:
            return None
        if batch.left_each < WORTH_TRYING:
            return None
        other = self._to_check(rates, batch)
        if other is not None:
            self._checking = True
            return _Trial(other)
        neglected = self._neglected(rates)
        return _Trial(neglected) if neglected is not None else None

    def _neglected(self, rates: dict[int, float]) -> int | None:
        """Another horizon than the one that is drafted, if it may be better than it once seemed."""
        if self.current == PLAIN:
            return None
        least = rates.get(self.current, float("inf")) / WITHIN
        for horizon in sorted(rates, key=lambda horizon: rates[horizon], reverse=True):
            wait = self._retry.get(horizon, FIRST_RETRY)
            waited = self._round - self._drafted.get(horizon, 0)
            if horizon not in (PLAIN, self.current) and rates[horizon] >= least and waited > wait:
                self._retry[horizon] = min(2 * wait, LONGEST_RETRY)
                return horizon
        return None

    def _knows(self, horizon: int) -> bool:
        if horizon == PLAIN:
            return self.costs.plain.observed >= TRIAL_OBSERVATIONS
        return self.costs.rounds.has_seen(horizon)

    def _to_check(self, rates: dict[int, float], batch: Batch) -> int | None:
        """A horizon of the kind that is not the choice, if it may win and is not well known."""
        plain = self.current != PLAIN  # whether that is to be checked
        waited = self._round - self._observed[plain]
        old = waited > self._wait[plain]
        if plain:
            work = Work(1, batch.requests, batch.context)
            near = self.costs.plain.knows(work, NEAR)
            hopeless = HOPELESS if near else HOPELESS_UNKNOWN
            # One never observed may win.
            predicted = rates.get(PLAIN, float("inf"))
            ordinary = old or not near
            if not ordinary and waited <= self._doubt:
                return None
            credible = self._credible_plain_rate(batch)
            self._doubts = not ordinary
            if hopeless * max(predicted, credible) <= rates.get(self.current, 0.0):
                return None
            return PLAIN if ordinary or credible > DOUBTFUL * predicted else None
        # Views would be opened for it: of fewer requests the others tell enough.
        drafting_work = Work(1, len(batch.drafters), batch.drafting_context)
        near = self.costs.rounds.knows(drafting_work, NEAR, or_larger=batch.without_view > 0)
        if not old and near:
            return None
        hoped = self.rates(batch, HOPED_AGREEMENT)
        drafting = {horizon: rate for horizon, rate in hoped.items() if horizon != PLAIN}
        best = max(drafting, key=lambda horizon: drafting[horizon], default=None)
        if best is None:
            return None
        factor = 1.0 if batch.without_view else HOPELESS
        return best if factor * drafting[best] > rates.get(PLAIN, 0.0) else None

    def _credible_plain_rate(self, batch: Batch) -> float:
        """Tokens a second of plain decoding if one token took what verifying two is predicted to
        take, which reads the same; 0.0 where nothing was heard of verifying."""
        rounds, work = self.costs.rounds, Work(1, batch.requests, batch.context)
        token = rounds.verifies.seconds(work)
        if not token:
            return 0.0
        steps = 1 if batch.token_by_token else self._fitting(token)
        return batch.requests * steps / (steps * token + rounds.rest.seconds(work))

    def _saw(self, plain: bool, length: int) -> None:
        self._observed[plain] = self._round
        self._drafted[length] = self._round
        if self._trial is not None and self._trial.horizon == length:
            self._trial.observed += 1

    def _end_trial(self) -> None:
        trial = self._trial
        if trial is None:
            return
        seen = trial.observed >= TRIAL_OBSERVATIONS
        if not seen and trial.rounds < TRIAL_ROUNDS:
            return
        self._trial = None
        if self._checking:
            self._checking = False
            plain = trial.horizon == PLAIN
            if plain and self._doubts:
                self._doubt = min(2 * self._doubt, LONGEST_CHECK)
            else:
                self._wait[plain] = min(2 * self._wait[plain], LONGEST_CHECK)
            self._pause = BETWEEN_CHECKS if seen else min(2 * self._pause, LONGEST_CHECK)
            self._next_check = self._round + self._pause
