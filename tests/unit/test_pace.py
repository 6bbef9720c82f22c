"""Timing of steps for the controller."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.rounds.batch import Batch
from sglang_vericache.rounds.controller import MOST_PLAIN_STEPS, PLAIN, HorizonController
from sglang_vericache.rounds.costs import FIRST_ROUNDS, THINNED
from sglang_vericache.rounds.cut import MOST_PARTS
from sglang_vericache.rounds.linear_cost import Work
from sglang_vericache.rounds.pace import Choice, Pace, _SwitchLog, create_pace, horizons_up_to

CONTEXTS = [1000] * 4
NONE = np.zeros(0)


def batch_of(contexts=CONTEXTS, drafters=None, **more) -> Batch:
    places = range(len(contexts)) if drafters is None else drafters
    left = [10000] * len(contexts)
    return Batch(contexts, left, places, np.full(len(places), 0.8), np.array([0.8]), **more)


class Recorder(HorizonController):
    def __init__(self, horizons=(PLAIN, 8), longest_step=float("inf")) -> None:
        super().__init__(horizons, longest_step)
        self.rounds: list[tuple[Work, float]] = []
        self.plain: list[tuple[Work, float]] = []

    def observe_round(self, work, seconds) -> None:
        self.rounds.append((work, seconds))
        super().observe_round(work, seconds)

    def observe_plain(self, work, seconds) -> None:
        self.plain.append((work, seconds))
        super().observe_plain(work, seconds)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(
    pace: Pace, clock: Clock, seconds: float, plain: int = 0, drafted: int = 8, **more
) -> Choice:
    """A step; it drafts ``drafted``, and ends the round, unless told otherwise."""
    choice = pace.begin(batch_of())
    ends = more.pop("ends", True)
    pace.planned(plain, ends, 0 if plain or not ends else drafted, **more)
    clock.now += seconds
    return choice


def world(horizons=(8,), longest_step=0.03) -> tuple[Recorder, Clock, Pace]:
    recorder, clock = Recorder(horizons, longest_step), Clock()
    return recorder, clock, Pace(8, recorder, clock)


@pytest.mark.parametrize(
    ("policy", "on_gpu", "adapts"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("fixed", True, False),
        ("adaptive", False, True),
    ],
)
def test_policies(policy, on_gpu, adapts):
    pace = create_pace(VeriCacheConfig(horizon_policy=policy), (0, 3, 7, 15), on_gpu)
    assert pace.adapts == adapts
    assert pace.begin(batch_of() if adapts else None).horizon == 15


@pytest.mark.parametrize(
    ("longest", "group", "horizons"),
    [
        (15, 4, (0, 3, 7, 15)),
        (15, 3, (0, 4, 7, 15)),
        (15, 1, (0, 3, 7, 15)),
        (15, 8, (0, 3, 7, 15)),
        (16, 4, (0, 3, 7, 16)),
        (1, 4, (0, 1)),
        (2, 4, (0, 2)),
        (3, 4, (0, 1, 3)),
        (6, 4, (0, 2, 6)),
    ],
)
def test_horizons(longest, group, horizons):
    assert horizons_up_to(longest, group) == horizons


def test_only_a_round_like_the_one_before_counts():
    """Catches a step charged with the one before it: the device is a step behind the host."""
    recorder, clock, pace = world()
    for seconds, drafted in ((9.0, 8), (0.02, 8), (0.03, 4), (0.01, 4), (0.01, 4)):
        run(pace, clock, seconds, drafted=drafted)
    run(pace, clock, 0.0)
    assert [(w.length, round(s, 3)) for w, s in recorder.rounds] == [
        (8, 0.02),
        (4, 0.01),
        (4, 0.01),
    ]


def test_steps_before_a_prefill_or_with_builds_do_not_count():
    """Catches a prefill's time taken for a slow horizon."""
    recorder, clock, pace = world()
    for what in ("", "", "builds", "", "", "prefill", "", ""):
        run(pace, clock, 0.02)
        if what == "builds":
            pace.unusual()
        if what == "prefill":
            pace.unusual()
            clock.now += 1.0
    run(pace, clock, 0.0)
    # The first, both of those marked, and the ones after them.
    assert [round(seconds, 3) for _, seconds in recorder.rounds] == [0.02] * 3


def test_a_long_round_takes_several_steps():
    """Catches steps that hold up arrivals, a round whose steps are judged one by one, and a
    horizon that changes in the middle of a round."""
    recorder, clock, pace = world()
    for _ in range(2):
        assert run(pace, clock, 0.08).share == 8
    for _ in range(2):
        run(pace, clock, 0.03, ends=False)
        run(pace, clock, 0.03, ends=False)
        choice = run(pace, clock, 0.04)
        assert (choice.horizon, choice.share) == (8, 3)
    run(pace, clock, 0.0)
    assert recorder.rounds[-1] == (Work(8, 4, 4000, steps=3), pytest.approx(0.1))


def test_parts_do_not_ask_for_more_parts():
    """Catches a batch whose rounds the host paces: in parts they take longer, which must not split
    them further."""
    _, clock, pace = world()
    for _ in range(4):
        run(pace, clock, 0.04)
    for _ in range(20):
        assert run(pace, clock, 0.04, ends=False).share == 4
        assert run(pace, clock, 0.04).share == 4


def test_one_slow_round_does_not_split_the_next():
    """Catches a compiled kernel that is taken for the length of a round, and rounds in shreds."""
    _, clock, pace = world()
    for seconds in (0.02, 0.02, 0.02, 9.0, 0.02, 0.02):
        choice = run(pace, clock, seconds)
    assert choice.share == 8
    for _ in range(8):
        choice = run(pace, clock, 9.0)
    assert choice.share == 8 // MOST_PARTS


def test_a_batch_that_changes_within_a_round_is_not_observed():
    recorder, clock, pace = world()
    for _ in range(4):
        pace.begin(batch_of())
        pace.planned(0, False)
        clock.now += 0.02
        pace.begin(batch_of([1000] * 3))
        pace.planned(0, True, 8)
        clock.now += 0.02
    assert recorder.rounds == []


def test_plain_decoding_is_judged_by_steps_of_several_tokens():
    """Catches the first steps, of one token each, told as the speed of plain decoding: the
    scheduler's own work is then all of it, and drafting wins where it should not."""
    recorder, clock, pace = world((PLAIN,))
    scheduler_s, token_s = 0.003, 0.001
    taken = []
    for _ in range(12):
        taken.append(pace.begin(batch_of()).plain_steps)
        pace.planned(taken[-1], True)
        clock.now += scheduler_s + taken[-1] * token_s
    assert taken[0] == 1 and taken[-1] == MOST_PLAIN_STEPS
    assert recorder.costs.token_seconds(4, 4000) == pytest.approx(token_s, rel=0.15)


def test_what_is_decoded_plainly_beside_a_round_is_not_its_cost():
    """Catches requests that cannot draft, counted as drafting."""
    recorder, clock, pace = world((PLAIN, 8))
    for _ in range(6):
        run(pace, clock, 0.010, plain=2)
    for _ in range(6):
        run(pace, clock, 0.030, undrafted=(0, 1, 2))
    run(pace, clock, 0.0)
    work, seconds = recorder.rounds[-1]
    assert (work.requests, work.context) == (1, 1000)
    assert 0.020 < seconds < 0.030


def test_a_round_is_charged_with_its_own_drafts():
    """Catches a step that verifies 8 tokens and drafts 4 ahead told as a round of either."""
    recorder, clock, pace = world()
    run(pace, clock, 0.02, ends=False, drafting=8)
    for drafted, drafting in ((8, 8), (8, 8), (8, 8), (8, 4), (4, 4), (4, 4)):
        run(pace, clock, 0.001 * (drafted + drafting), drafted=drafted, drafting=drafting)
    for _ in range(3):  # in two parts
        run(pace, clock, 0.005, ends=False, drafting=2)
        run(pace, clock, 0.005, drafted=4, drafting=2)
    run(pace, clock, 0.0)
    told = [(work.length, work.steps, round(seconds, 3)) for work, seconds in recorder.rounds]
    assert told == [(8, 1, 0.016), (4, 1, 0.008), (4, 2, 0.01), (4, 2, 0.01)]


def test_phases_are_told_with_what_they_computed():
    """Catches a phase told as one of the step that runs when it is heard of, shares told as whole
    rounds, and the short phases of a round, of which the beginning is most."""
    recorder, clock, pace = world()
    drafts, verifies = [], []
    recorder.costs.rounds.drafts.observe = lambda *told: drafts.append(told)
    recorder.costs.rounds.verifies.observe = lambda *told: verifies.append(told)
    run(pace, clock, 0.01, ends=False)
    first, longer = pace.drafting([(0, 1)]), pace.drafting([(1, 3), (3, 4), (2, 2)])
    run(pace, clock, 0.01, drafted=5)
    verified = pace.verifying([(1, 4), (0, 5)])
    run(pace, clock, 0.01)
    assert not drafts and not verifies
    longer(0.008)
    first(0.004)
    verified(0.02)
    run(pace, clock, 0.01)
    assert drafts == [(Work(1, 3, 3000), 0.002)] and verifies == [(Work(5, 2, 2000), 0.02)]
    run(pace, clock, 0.01)
    assert len(drafts) == len(verifies) == 1


def test_the_host_learns_of_few_rounds_in_the_end():
    """Catches a tenth of a millisecond for what has not changed; verifications, whose widths do
    change, are all learnt of."""
    recorder, clock, pace = world()
    for _ in range(FIRST_ROUNDS + 10 * THINNED + 1):
        run(pace, clock, 0.02)
        pace.drafting([(0, 8)])(0.008)
        pace.verifying([(0, 8)])(0.01)
    rounds = recorder.costs.rounds
    assert rounds.drafts.observed == FIRST_ROUNDS + 10
    assert rounds.verifies.observed == FIRST_ROUNDS + 10 * THINNED


def test_nobody_hears_of_phases_that_say_nothing():
    """Neither without a controller, nor where KV that arrives is what takes the time."""
    fixed = Pace(8, None)
    fixed.begin(None)
    assert fixed.drafting([(0, 8)]) is None and fixed.verifying([(0, 8)]) is None
    _, _, pace = world()
    pace.begin(batch_of(rotating=True))
    assert pace.drafting([(0, 8)]) is None and pace.verifying([(0, 8)]) is None


def test_parts_of_a_round_that_is_drafted_ahead():
    """Catches a verification with a whole share of drafts behind it."""
    clock = Clock()
    pace = Pace(15, Recorder((15,), 0.03), clock)
    pace.controller.ahead = True
    work = [(i, 15) for i in range(4)]
    for _ in range(3):
        pace.begin(batch_of())
        pace.planned(0, True, 15)
        pace.drafting(work)(15 * 0.0054)
        pace.verifying(work)(0.023)
        clock.now += 0.1045
    choice = pace.begin(batch_of())
    assert (choice.share, choice.behind) == (5, 1)


def test_groups_share_a_round():
    """With four groups a step does a quarter of what a round of all would."""
    recorder, clock = Recorder((8,)), Clock()
    pace = Pace(8, recorder, clock, groups=4)
    for _ in range(3):
        run(pace, clock, 0.01)
    assert recorder.rounds[-1][1] == pytest.approx(0.04)


def test_what_views_cost_is_passed_on():
    recorder, _, pace = world()
    for _ in range(3):
        pace.built(0.02, 1000)
    assert recorder.costs.build_seconds(500) == pytest.approx(0.01)


def test_steps_are_whole_without_a_controller():
    """Catches rounds of the fixed policy that are split."""
    pace = Pace(8, None)
    choice = pace.begin(None)
    pace.planned(1, True)
    pace.unusual()
    pace.built(1.0, 1000)
    assert (choice.horizon, choice.share, choice.plain_steps) == (8, 8, 1)
    assert choice.lasting and pace.describe() == {}


def test_description():
    """What the info endpoint shows: predictions by horizon, their ground, and what was done."""
    _, clock, pace = world((PLAIN, 4, 8))
    assert pace.describe()["chosen"] == {}
    for _ in range(30):
        choice = pace.begin(batch_of())
        pace.planned(0 if choice.horizon else choice.plain_steps, True, choice.horizon)
        clock.now += 0.01 + 0.002 * choice.horizon
    shown = pace.describe()
    assert set(shown["predicted"]) == {"0", "4", "8"} == set(shown["chosen"])
    assert all(p["seconds"] > 0 and p["tokens_per_s"] > 0 for p in shown["predicted"].values())
    assert shown["batch"]["mean_agreement"] == pytest.approx(0.8)
    costs = shown["costs"]
    assert len(costs["plain_s"]) == 4 and len(costs["round_s"]) == 7
    assert {"draft_s", "verify_s", "rest_s"} <= set(costs)


def test_an_empty_batch_and_one_that_cannot_draft():
    _, clock, pace = world((PLAIN, 4, 8))
    for batch in (batch_of([]), batch_of(drafters=[])):
        for _ in range(5):
            pace.begin(batch)
            pace.planned(1 if batch.contexts else 0, True)
            clock.now += 0.01
        assert pace.describe()["batch"]["mean_agreement"] is None


def test_switches_are_not_all_logged(caplog):
    clock, batch = Clock(), batch_of()
    log = _SwitchLog(clock)
    with caplog.at_level(logging.INFO):
        for second in range(25):
            clock.now = float(second)
            log(8, 0, batch)
    assert len(caplog.records) == 3
    assert "9 more switches" in caplog.text
