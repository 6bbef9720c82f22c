"""A view that is closed and opened again larger, over the spans of a tree."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
from view_fakes import World

from sglang_vericache.metrics import DraftCounters
from sglang_vericache.phase_clock import PhaseClock
from sglang_vericache.pool.rows import DraftRows
from sglang_vericache.rounds.draft_room import DraftRoom
from sglang_vericache.rounds.pace import Choice
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.rounds.view_keeper import ViewKeeper
from sglang_vericache.support import AWAITS_CHECKPOINT, AWAITS_VIEW, PLAIN_IS_FASTER

PROMPT = 600
DRAFTS = Choice(4, True, 4)


class Keeping:
    """Requests with the same prompt, whose node is in the tree."""

    def __init__(
        self, requests: int = 1, slots: int = 6000, clock=time.perf_counter, **settings
    ) -> None:
        settings = {"grow_views": True} | settings
        self.world = world = World(slots, min_context_tokens=100, **settings)
        world.rows = DraftRows(5, 1600, "cpu")  # with room for whole paths
        world.views.rows = world.rows
        self.states = [
            RequestState(
                rid=str(row),
                row=row,
                obstacle=None,
                group=0,
                counters=DraftCounters(),
                prompt_tokens=PROMPT,
                horizon=4,
                budget=world.views.budget,
                may_grow=True,
            )
            for row in range(requests)
        ]
        for row in range(1, requests):
            world.share(row, 0, PROMPT)
        tree = SimpleNamespace(
            holds_prompt=lambda *_: True, path_of=lambda req: (world.node(7, 0, PROMPT),)
        )
        capture = SimpleNamespace(observation=lambda rid: None, forget=lambda rid: None)
        pace = SimpleNamespace(adapts=False, unusual=lambda: None)
        room = DraftRoom(world.views, self.states, lambda req: (), lambda req: world.views.budget)
        phases = PhaseClock("cpu")
        self.keeper = ViewKeeper(
            world.config, world.views, tree, capture, pace, phases, room, clock
        )

    def step(
        self,
        committed: int,
        left: int = 300,
        choice: Choice = DRAFTS,
        outputs=(5,),
        prompts_wait: bool = False,
    ):
        many = len(self.states)
        reqs = [SimpleNamespace(rid=state.rid, output_ids=outputs) for state in self.states]
        lengths = [committed] * many, [left] * many
        return self.keeper.prepare(reqs, self.states, *lengths, choice, prompts_wait=prompts_wait)

    def fail(self, *states: RequestState) -> None:
        for state in states or self.states:
            for _ in range(60):
                state.agreement.add(4, 0)

    @property
    def rows(self) -> list[int]:
        return [state.view.span_rows for state in self.states]

    def check(self, committed: int) -> None:
        """Every row of the views is a token of its path, and no slot is lost or doubled."""
        views = [state.view for state in self.states]
        assert self.world.held(views) == self.world.used
        for view in views:
            self.world.tokens_of(view, committed)


def test_grows_until_all_is_kept():
    """Catches a larger span that its node does not own, a tail with a hole, and a view that is
    replaced for ever."""
    keeping = Keeping()
    assert keeping.step(PROMPT + 1) == [None] and keeping.rows == [120]
    for committed, rows in ((640, 240), (700, 480), (760, 600), (780, 600)):
        view = keeping.states[0].view
        keeping.world.commit(view, view.tail_start, committed)
        keeping.fail()
        assert keeping.step(committed) == [None]
        assert keeping.rows == [rows]
        assert keeping.world.spans.get(7).rows == rows, "others with the prompt get it as well"
        keeping.check(committed)
    assert keeping.world.counters.views_grown == 3


def test_folds_within_the_larger_budget():
    """Catches a tail that is folded by the request's first budget."""
    keeping = Keeping()
    keeping.step(PROMPT + 1)
    keeping.fail()
    keeping.step(PROMPT + 2)
    view = keeping.states[0].view
    keeping.world.commit(view, PROMPT, 850)
    assert keeping.step(850) == [None]
    assert keeping.states[0].view is view and view.tail_start == 850 - 64
    assert view.span_rows == 240 + -(-186 * 4 // 10), "two fifths of what was folded"
    keeping.check(850)


def test_first_tokens_do_not_wait_for_a_view():
    """Catches a view that is opened while the first token is still to be sent, as it is under
    overlap scheduling where a step is launched before the prefill's result is looked at."""
    keeping = Keeping(2)
    assert keeping.step(PROMPT + 1, outputs=()) == [AWAITS_CHECKPOINT] * 2
    assert keeping.step(PROMPT + 2) == [None] * 2


@pytest.mark.parametrize(
    ("prompts_wait", "adapts", "steps"),
    [(True, True, (1, 2, 3)), (False, True, (3,)), (True, False, (3,))],
)
def test_views_are_opened_over_several_steps_while_prompts_wait(prompts_wait, adapts, steps):
    """Catches a step that opens the views of hundreds while prompts keep coming, and views that
    are never opened because the first takes longer than a step may last."""
    clock = itertools.count(step=0.04).__next__  # a step may last 0.03 s
    keeping = Keeping(3, clock=clock)
    keeping.keeper.pace.adapts, keeping.keeper.pace.built = adapts, lambda *_: None
    for nth, opened in enumerate(steps):
        reasons = keeping.step(PROMPT + 1 + nth, prompts_wait=prompts_wait)
        assert reasons == [None] * opened + [AWAITS_VIEW] * (3 - opened)


@pytest.mark.parametrize("drafted", [0, 4])
def test_folds_whatever_is_drafted(drafted):
    """Catches tails that are never folded while rounds are drafted ahead."""
    keeping = Keeping(keep_ratio=0.3)
    keeping.step(PROMPT + 1)
    state = keeping.states[0]
    keeping.world.commit(state.view, PROMPT, 850 + drafted)
    state.drafted = drafted
    assert keeping.step(850) == [None]
    assert state.view.tail_start == 850 - 64 and state.drafted == drafted
    assert not keeping.keeper.built, "a tail is folded without its full KV"
    keeping.check(850 + drafted)


def test_tails_are_folded_together():
    """Catches a fold for each request by itself, which in a large batch is one in every step, and
    short tails that are folded by a few tokens at a time."""
    keeping = Keeping(4)  # tails of more than 200 are folded, of 64 tokens nothing is
    keeping.step(PROMPT + 1)
    lengths = [PROMPT + tail for tail in (201, 133, 132, 70)]
    reqs = [SimpleNamespace(rid=state.rid, output_ids=[5]) for state in keeping.states]
    for state, length in zip(keeping.states, lengths, strict=True):
        keeping.world.commit(state.view, PROMPT, length)

    def step(lengths):
        assert keeping.keeper.prepare(reqs, keeping.states, lengths, [99] * 4, DRAFTS) == [None] * 4
        return [s.view.tail_tokens(n) for s, n in zip(keeping.states, lengths, strict=True)]

    assert step([lengths[0] - 1, *lengths[1:]]) == [200, 133, 132, 70]
    assert step(lengths) == [132, 64, 132, 70]
    assert keeping.world.counters.folded == 2


def test_no_tail_stays_too_long():
    """Catches a tail that grows faster than the shortest one lets it be folded, until its row
    overflows: the limit is just above what must stay."""
    keeping = Keeping(3, fold_tail_tokens=65, slots=9000)
    keeping.step(PROMPT + 1)
    lengths = [PROMPT + 1] * 3
    reqs = [SimpleNamespace(rid=state.rid, output_ids=[5]) for state in keeping.states]
    for _ in range(60):
        for i, more in enumerate((1, 3, 5)):
            keeping.world.commit(keeping.states[i].view, lengths[i], lengths[i] + more)
            lengths[i] += more
        assert keeping.keeper.prepare(reqs, keeping.states, lengths, [99] * 3, DRAFTS) == [None] * 3
        tails = [s.view.tail_tokens(n) for s, n in zip(keeping.states, lengths, strict=True)]
        assert max(tails) <= 65
    for state, length in zip(keeping.states, lengths, strict=True):
        keeping.world.tokens_of(state.view, length)


def test_a_long_tail_is_in_the_new_span():
    keeping = Keeping()
    keeping.step(PROMPT + 1)
    view = keeping.states[0].view
    keeping.world.commit(view, PROMPT, 810)
    keeping.fail()
    assert keeping.step(810) == [None]
    assert keeping.states[0].view.tail_start == 810 and keeping.rows == [2 * 162]
    keeping.check(810)


def test_drafted_tokens_are_not_lost():
    """Catches a view replaced under what was drafted over it; the planner is told to let it be."""
    keeping = Keeping()
    state = keeping.states[0]
    keeping.step(PROMPT + 1)
    keeping.fail()
    state.drafted = 4
    keeping.step(PROMPT + 2)
    assert state.grows_next and keeping.rows == [120] and state.drafted == 4
    state.drafted = 0
    keeping.step(PROMPT + 4)
    assert not state.grows_next and keeping.rows == [240]


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": {"grow_views": False}},
        {"settings": {"keep_ratio": None, "keep_tokens": 120}},
        {"may_grow": False},
        {"full": False},
        {"left": 20},
        {"choice": Choice(0, False, 0)},
        {"slots": 600},
    ],
    ids=str,
)
def test_who_does_not_grow(changed):
    """Catches growth that was switched off, that a request's own ratio rules out, without the full
    KV, near the end, beside plain decoding, and in a pool with nothing to spare."""
    keeping = Keeping(slots=changed.get("slots", 6000), **changed.get("settings", {}))
    state = keeping.states[0]
    keeping.step(PROMPT + 1)
    keeping.fail()
    state.may_grow, state.full = changed.get("may_grow", True), changed.get("full", True)
    choice = changed.get("choice", DRAFTS)
    reasons = keeping.step(PROMPT + 2, changed.get("left", 300), choice)
    assert reasons == [PLAIN_IS_FASTER if "choice" in changed else None]
    assert keeping.rows == [120] and keeping.world.counters.views_grown == 0


def test_one_of_two_with_a_span():
    """Catches a larger span that takes the smaller one from who still reads it, and a second
    growth that builds what is there."""
    keeping = Keeping(requests=2)
    keeping.step(PROMPT + 1)
    first, second = keeping.states
    keeping.fail(first)
    keeping.step(PROMPT + 2)
    assert keeping.rows == [240, 120]
    keeping.world.commit(second.view, PROMPT + 1, PROMPT + 2)
    keeping.check(PROMPT + 2)
    built = keeping.world.counters.built
    keeping.fail(second)
    keeping.step(PROMPT + 3)
    assert keeping.rows[1] == 240 and keeping.world.counters.built == built
    keeping.world.commit(first.view, PROMPT + 2, PROMPT + 3)
    keeping.check(PROMPT + 3)


def test_idle_spans_are_not_evicted_for_it():
    """Catches growth that throws away the spans of prompts that may come again."""
    keeping = Keeping(slots=850)
    idle = keeping.world.open(4, 1000, (keeping.world.node(9, 0, 1000),))
    keeping.world.views.close(idle)
    keeping.step(PROMPT + 1)
    keeping.fail()
    keeping.step(PROMPT + 2)
    assert keeping.rows == [120] and keeping.world.counters.evicted == 0
    assert keeping.world.spans.get(9).rows == 200
