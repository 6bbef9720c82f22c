"""Times the steps of a batch, for the horizon controller and for the length of a step. Pure."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.rounds.batch import Batch
from sglang_vericache.rounds.controller import PLAIN, HorizonController
from sglang_vericache.rounds.linear_cost import Work
from sglang_vericache.rounds.phase_reports import PhaseReports, Told

logger = logging.getLogger(__name__)

# Seconds between two log lines of switches.
LOG_INTERVAL = 10.0
# Rows of queries, query heads times tokens, in the smallest tile of FlashInfer's prefill kernel.
TILE_ROWS = 16


@dataclass(frozen=True)
class Choice:
    """Attributes:
    horizon: most tokens to draft in this round; PLAIN for none.
    lasting: draft views that it does not need may be closed.
    share: most tokens to draft in this step.
    plain_steps: tokens to decode plainly in this step where nothing drafts.
    behind: instead of ``share`` behind a verification; None for no difference.
    """

    horizon: int
    lasting: bool
    share: int
    plain_steps: int = 1
    behind: int | None = None


@dataclass
class _Round:
    """What is timed as a whole: a plain step, or the steps up to a verification.

    Attributes:
        horizon: most tokens that it may draft.
        plain_tokens: tokens that every request decodes plainly; 0 when some request drafts.
        drafted: most tokens drafted before the verification.
        drafting: most tokens drafted in its steps, some of which may be of the next round.
        undrafted: places of requests that are decoded plainly beside those that draft.
        usual: what it took tells what others like it take.
    """

    batch: Batch
    horizon: int
    seconds: float = 0.0
    steps: int = 0
    plain_tokens: int = 0
    drafted: int = 0
    drafting: int = 0
    undrafted: Sequence[int] = ()
    usual: bool = True
    ended: bool = True
    works: tuple[Work, Work | None] | None = field(default=None, repr=False)


class Pace:
    """A step lasts from its beginning to the next one's.

    Args:
        controller: None keeps to ``horizon``, a whole round and one plain token a step.
        groups: a round's verifications are spread over so many steps.

    Attributes:
        rounds_in_parts: steps that drafted and left the verification to a later one.
        plain_together: steps that decoded several plain tokens of each request.
        chosen: rounds by horizon; plain steps as PLAIN, whatever was chosen.
    """

    def __init__(
        self,
        horizon: int,
        controller: HorizonController | None,
        clock: Callable[[], float] = time.perf_counter,
        groups: int = 1,
    ) -> None:
        self.controller, self._clock, self.groups = controller, clock, groups
        self._choice = Choice(horizon, True, horizon)
        self._round: _Round | None = None
        self._before: _Round | None = None
        self._began = 0.0
        self._shown: Batch | None = None
        self._phases: PhaseReports | None = None
        if controller is not None:
            self._phases = PhaseReports(controller.costs.rounds)
        self._batch: Batch | None = None  # of this step, where its phases are to be timed
        self.rounds_in_parts = self.plain_together = 0
        self.chosen: Counter[int] = Counter()

    @property
    def adapts(self) -> bool:
        return self.controller is not None

    def begin(self, batch: Batch | None) -> Choice:
        """A step begins; without a controller nothing of the batch is looked at."""
        if self.controller is None or batch is None:
            return self._choice
        now = self._clock()
        self._batch = None if batch.rotating else batch
        if self._round is not None:
            self._round.seconds += now - self._began
            self._round.steps += 1
        self._began = now
        if self._round is None or self._round.ended:
            if self._round is not None:
                self._report(self._round)
            self._choice = self._choose(batch)
            if batch.drafters or self._shown is None:
                self._shown = batch
            self._round = _Round(batch, self._choice.horizon, usual=not batch.rotating)
        elif batch.rotating or batch.requests != self._round.batch.requests:
            self._round.usual = False
        return self._choice

    def planned(
        self,
        plain_steps: int,
        ends_round: bool,
        drafted: int = 0,
        undrafted: Sequence[int] = (),
        drafting: int | None = None,
    ) -> None:
        """What the step that just began does; see `_Round`."""
        self.rounds_in_parts += not ends_round
        self.plain_together += plain_steps > 1
        if self._round is not None:
            self._round.plain_tokens, self._round.ended = plain_steps, ends_round
            self._round.drafted, self._round.undrafted = drafted, undrafted
            self._round.drafting += drafted if drafting is None else drafting
            if ends_round and self._round.drafting != drafted:
                self._round.usual = False  # another horizon was drafted than verified

    def unusual(self) -> None:
        """This step does what most do not (it opens draft views), or a prefill follows it: how
        long it took says nothing of others."""
        if self._round is not None:
            self._round.usual = False

    def drafting(self, work: Sequence[tuple[int, int]]) -> Told | None:
        """Who is to be told what drafting (place of a request, tokens) in this step takes the
        device; None for nobody."""
        if self._phases is None or self._batch is None:
            return None
        return self._phases.drafting(work, self._batch)

    def verifying(self, work: Sequence[tuple[int, int]]) -> Told | None:
        """The same of verifying (place of a request, tokens drafted)."""
        if self._phases is None or self._batch is None:
            return None
        return self._phases.verifying(work, self._batch)

    def built(self, seconds: float, tokens: int) -> None:
        """Opening views of so many tokens of context took the device so long."""
        if self.controller is not None:
            self.controller.costs.observe_build(seconds, tokens)

    def describe(self) -> dict[str, Any]:
        """For the info endpoint: predictions for the last batch in which somebody could draft, and
        what they rest on."""
        if self.controller is None:
            return {}
        described: dict[str, Any] = {
            "chosen": {str(h): count for h, count in sorted(self.chosen.items())},
            "current": self.controller.current,
            "costs": self.controller.costs.describe(),
        }
        batch = self._shown
        if batch is None:
            return described
        described["batch"] = {
            "requests": batch.requests,
            "drafters": len(batch.drafters),
            "context_tokens": batch.context,
            "mean_agreement": batch.mean_agreement,
        }
        described["predicted"] = {
            str(h): {
                "seconds": self.controller.seconds(h, batch),
                "tokens_per_s": round(rate, 1),
            }
            for h, rate in self.controller.rates(batch).items()
        }
        return described

    def _choose(self, batch: Batch) -> Choice:
        assert self.controller is not None
        horizon = self.controller.choose(batch)
        cut = self.controller.cut(horizon, batch)
        return Choice(
            horizon,
            horizon != PLAIN or self.controller.closes_views,
            share=cut.share,
            plain_steps=self.controller.plain_steps(batch),
            behind=cut.behind,
        )

    def _report(self, done: _Round) -> None:
        """Only of a round like the one before: under overlap scheduling the device still works
        on that one while this is timed."""
        assert self.controller is not None and self._phases is not None
        self._phases.pass_on()
        before, self._before = self._before, done
        self.chosen[PLAIN if done.plain_tokens else done.horizon] += 1
        done.works = works = self._works(done)
        if before is None:
            return
        if not (done.usual and before.usual) or works is None or not _alike(works, before.works):
            return
        work, beside = works
        if done.plain_tokens:
            self.controller.observe_plain(work, done.seconds)
            return
        seconds = done.seconds * self.groups
        if beside is not None:
            token = self.controller.costs.token_seconds(beside.requests, beside.context)
            seconds -= done.steps * token
        self.controller.observe_round(work, seconds)

    def _works(self, done: _Round) -> tuple[Work, Work | None] | None:
        """What was computed, and what was decoded plainly beside a round."""
        contexts, total = done.batch.contexts, done.batch.context
        requests = len(contexts)
        if done.plain_tokens:
            return Work(done.plain_tokens, requests, total), None
        if not done.drafted:
            return None
        aside = sum(contexts[i] for i in done.undrafted if i < requests)
        drafting = requests - len(done.undrafted)
        work = Work(done.drafted, drafting, total - aside, done.steps)
        return work, Work(1, requests - drafting, aside) if requests > drafting else None


def _alike(works: tuple[Work, Work | None], before: tuple[Work, Work | None] | None) -> bool:
    if before is None:
        return False
    (one, beside), (other, beside_other) = works, before
    return (one.length, one.steps) == (other.length, other.steps) and (beside is None) == (
        beside_other is None
    )


def horizons_up_to(longest: int, group: int) -> tuple[int, ...]:
    """What the controller may choose from: the longest, and verifications half and a quarter as
    wide, the latter as wide as fills FlashInfer's smallest tile of queries where that is near.

    Args:
        group: query heads of a kv head.
    """
    width = longest + 1
    half, quarter = width // 2 - 1, width // 4 - 1
    tile = TILE_ROWS // group - 1
    if longest // 5 <= tile < half:
        quarter = tile
    return tuple(sorted({PLAIN, quarter, half, longest} - {-1}))


def create_pace(
    config: VeriCacheConfig, horizons: Sequence[int], on_gpu: bool, ahead: bool = False
) -> Pace:
    """As ``config.horizon_policy`` says; of ``horizons`` where that chooses.

    Args:
        ahead: rounds are drafted in the step that verifies the one before.
    """
    policy = config.horizon_policy
    if policy == "fixed" or (policy == "auto" and not on_gpu):
        return Pace(config.horizon, None)
    controller = HorizonController(horizons, config.max_step_seconds, _SwitchLog(), ahead=ahead)
    return Pace(config.horizon, controller, groups=config.stagger_groups)


class _SwitchLog:
    """A line for a switch, not for each of many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last, self._untold = clock, -math.inf, 0

    def __call__(self, before: int, after: int, batch: Batch) -> None:
        now = self._clock()
        if now - self._last < LOG_INTERVAL:
            self._untold += 1
            return
        more = f", and {self._untold} more switches before" if self._untold else ""
        self._last, self._untold = now, 0
        logger.info(
            "vericache horizon: %d instead of %d for %d requests of %d tokens%s",
            *(after, before, batch.requests, batch.context // max(batch.requests, 1), more),
        )
