"""Requests that need several times the pool, scheduled as SGLang would, on its own radix cache."""

from __future__ import annotations

import random
from types import SimpleNamespace

import cpu_engine
import pytest

cpu_engine.required()

from tree_world import Request, World, settings  # noqa: E402, F401

from sglang_vericache.compressors.budget import Budget  # noqa: E402
from sglang_vericache.config import VeriCacheConfig  # noqa: E402
from sglang_vericache.loader.planner import Place  # noqa: E402
from sglang_vericache.metrics import SpanCounters  # noqa: E402
from sglang_vericache.pool.allocator import SlotAllocator  # noqa: E402
from sglang_vericache.rounds.agreement import Agreement  # noqa: E402
from sglang_vericache.rounds.draft_room import DraftRoom  # noqa: E402
from sglang_vericache.rounds.pace import Choice  # noqa: E402
from sglang_vericache.rounds.policy import RoundPlan  # noqa: E402
from sglang_vericache.rounds.rotation import Rotation  # noqa: E402
from sglang_vericache.rounds.step_watch import StepWatch  # noqa: E402
from sglang_vericache.tree.span_table import SpanTable  # noqa: E402

WIDTH = 5


class Drafts:
    """The draft pool by numbers: what ViewBuilder has of it, and the states of who drafts."""

    def __init__(self, slots: int) -> None:
        self.config = VeriCacheConfig(
            min_context_tokens=8,
            horizon=WIDTH - 1,
            fold_tail_tokens=70,
            draft_ahead="off",
            keep_min_tokens=0,
        )
        self.budget = Budget.of(self.config)
        self.pool = SimpleNamespace(allocator=SlotAllocator(slots, "cpu"))
        self.spans, self.scorer = SpanTable(SpanCounters()), SimpleNamespace(scope="path")
        self.states: list[SimpleNamespace] = []

    def open(self, states, reqs) -> None:
        """Views for those that have none, as far as there is room, and what others' ends freed."""
        running = {req.rid: req for req in reqs}
        for state in self.states:
            if state.rid not in running and state.view is not None:
                self.pool.allocator.give(state.view.slots)
        self.states[:] = [s for s in self.states if s.rid in running]
        known = {s.rid for s in self.states}
        for state in states:
            if state.rid in known:
                continue
            rows = self.budget.path_rows(len(running[state.rid].text))
            slots = self.pool.allocator.take(rows + self.config.tail_capacity)
            self.states.append(state)
            if slots is not None:
                state.view = SimpleNamespace(slots=slots, capacity=len(slots), span_rows=rows)


class Scheduler:
    """
    Attributes:
        most_together: requests that ran at a time.
        done: texts at their end by the text at the start.
    """

    def __init__(
        self,
        world: World,
        push_tokens: int = 40,
        plain: float = 0.0,
        watch=None,
        drafts=None,
        ahead: bool = False,
    ) -> None:
        self.world, self.drafts = world, drafts or Drafts(1 << 20)
        self.room = DraftRoom(
            self.drafts, self.drafts.states, world.cache.path_of, lambda req: self.drafts.budget
        )
        self.rotation = Rotation(
            world.residency, world.allocator, WIDTH, push_tokens, watch, self.room
        )
        world.cache.rotation = self.rotation
        self.waiting: list[tuple[list[int], int]] = []
        self.left: dict[str, int] = {}
        self.drafting: set[str] = set()
        self.states: dict[str, SimpleNamespace] = {}
        self.bound_beside_rotating = 0
        self.rng = random.Random(1)
        self.plain, self.ahead = plain, ahead
        self.most_together = self.retracted = self.steps = 0
        self.done: list[list[int]] = []

    def run(self, most_steps: int, on_step=lambda step: None) -> None:
        while self.waiting or self.world.requests:
            self.steps += 1
            assert self.steps < most_steps, (
                f"{len(self.world.requests)} running, {len(self.waiting)} waiting: "
                f"{self.rotation.numbers()}"
            )
            on_step(self.steps)
            self.world.events()
            self.admit()
            self.retract()
            self.decode()
            self.world.check_ledger()
            self.most_together = max(self.most_together, len(self.world.requests))

    def admit(self) -> None:
        while self.waiting:
            text, output = self.waiting[0]
            ahead = sum(self.left[r.rid] + WIDTH for r in self.world.requests)
            remaining = self.rotation.free - ahead
            candidate = Request("candidate", text)
            if not self.world.cache.may_admit(candidate, remaining, output):
                return
            needed = len(text) + output + 1
            if needed > remaining:
                assert self.world.cache.on_refusal(needed - remaining)
                return
            req = self.world.admit(text)
            if req is None:
                return  # the prefill was put off
            self.rotation.before_extend(SimpleNamespace(chunked_req=None, reqs=[req]))
            self.waiting.pop(0)
            self.left[req.rid] = output
            req.sampling_params.max_new_tokens = output
            self.states[req.rid] = SimpleNamespace(
                view=None,
                drafted=0,
                full=True,
                rotates=False,
                released=False,
                rid=req.rid,
                horizon=WIDTH - 1,
                deepest=WIDTH - 1,
                agreement=Agreement(),
            )
            if self.rng.random() >= self.plain:
                self.drafting.add(req.rid)

    def retract(self) -> None:
        while self.world.requests:
            fits = self.rotation.free >= WIDTH * len(self.world.requests)
            if fits and self.world.cache.may_decode(self.world.requests):
                return
            assert len(self.world.requests) > 1, "even the last one does not fit"
            self.retracted += 1
            self.give_up(self.world.requests[-1])

    def give_up(self, req) -> None:
        self.waiting.insert(0, (req.text, self.left.pop(req.rid)))
        self.world.end(req, checkpoint=False)

    def decode(self) -> None:
        reqs = list(self.world.requests)
        if not reqs:
            return
        states = [self.states[r.rid] for r in reqs]
        self.drafts.open([s for s in states if s.rid in self.drafting], reqs)
        away = any(not self.world.residency.is_full(r) for r in reqs)
        self.bound_beside_rotating += away and any(
            s.view is None and s.rid in self.drafting for s in states
        )
        self.rotation.step(reqs, states, [len(r.text) - 1 for r in reqs], views_built=False)
        plain = [i for i, s in enumerate(states) if s.full and s.view is None]
        verify = [(i, WIDTH - 1) for i, s in enumerate(states) if s.full and s.view is not None]
        draft = [
            (i, WIDTH - 1 - s.drafted)
            for i, s in enumerate(states)
            if s.view is not None and s.drafted < WIDTH - 1
        ]
        plan = RoundPlan(tuple(plain), tuple(draft), tuple(verify))
        self.rotation.check(reqs, states, [len(r.text) - 1 for r in reqs], plan)
        for i, count in draft:
            states[i].drafted += count
        at_rest = all(s.full and not s.rotates for s in states)
        for req, state in zip(reqs, states, strict=True):
            assert state.full or self.left[req.rid] > 1, "SGLang would lose its last token"
        for i in (*plain, *(i for i, _ in verify)):
            count = 1 if i in plain else self.rng.randint(1, WIDTH)
            count = min(count, self.left[reqs[i].rid])
            assert self.world.generate(reqs[i], count), "no room for a tail"
            states[i].drafted = WIDTH - 1 if self.ahead and at_rest and i not in plain else 0
            self.left[reqs[i].rid] -= count
        for req in reqs:
            if self.left[req.rid] == 0:
                self.done.append(req.text)
                self.world.end(req, checkpoint=True)


def texts(seed: int, count: int, shortest: int, longest: int, shared: float) -> list[list[int]]:
    rng = random.Random(seed)
    prefixes = [[rng.randrange(50) for _ in range(shortest)] for _ in range(3)]
    found = []
    for n in range(count):
        head = prefixes[rng.randrange(3)] if rng.random() < shared else []
        rest = rng.randint(shortest, longest) - len(head)
        found.append([*head, n % 50, *(rng.randrange(50) for _ in range(max(rest, 4)))])
    return found


def finish(world: World, scheduler: Scheduler, wanted: int) -> None:
    assert len(scheduler.done) == wanted
    world.check_idle()
    world.close()


@pytest.mark.parametrize("core", ["rust", "python"])
@pytest.mark.parametrize("share", [2, 4, 8])
def test_a_part_of_the_pool(core, share):
    """Eight requests that would need ``share`` times the pool: all get there, and more run
    together than fit."""
    prompts = texts(3, 8, 90, 130, 0.0)
    needed = sum(len(t) + 40 + 2 * WIDTH for t in prompts)
    world = World(device=max(needed // share, 200), host=4_000, core=core)
    scheduler = Scheduler(world)
    scheduler.waiting = [(t, 40) for t in prompts]
    scheduler.run(20_000)
    numbers = scheduler.rotation.numbers()
    assert numbers.detachments > 0 and numbers.fetched_tokens > 0
    assert scheduler.most_together > world.allocator.size // 130
    finish(world, scheduler, 8)


def test_what_fits_never_moves():
    world = World(device=2_000, host=4_000)
    scheduler = Scheduler(world)
    scheduler.waiting = [(t, 60) for t in texts(4, 8, 90, 130, 0.3)]
    scheduler.run(2_000)
    numbers = scheduler.rotation.numbers()
    assert (numbers.detachments, numbers.fetches) == (0, 0)
    finish(world, scheduler, 8)


@pytest.mark.parametrize("ahead", [False, True], ids=["", "drafting ahead"])
@pytest.mark.parametrize("plain", [0.0, 0.3], ids=["all draft", "some are plain"])
@pytest.mark.parametrize("shared", [0.0, 0.8], ids=["private", "shared"])
@pytest.mark.parametrize("host", [6_000, 900], ids=["roomy host", "tight host"])
def test_many(shared, host, plain, ahead):
    """Sixty requests through a pool for three, some plain, some sharing, with retraction when the
    tails outgrow it; a host pool that is full as well keeps requests attached."""
    world = World(device=450, host=host)
    scheduler = Scheduler(world, plain=plain, ahead=ahead)
    prompts = texts(5, 60, 40, 140, shared)
    scheduler.waiting = [(t, 5 + (n * 13) % 90) for n, t in enumerate(prompts)]
    scheduler.run(50_000)
    assert scheduler.rotation.numbers().detachments > 0
    finish(world, scheduler, 60)


@pytest.mark.parametrize("views", [3, 4, 5])
@pytest.mark.parametrize("asked", [True, False], ids=["room asked for", "not asked"])
def test_a_small_draft_pool(asked, views):
    """Views for a few of sixteen requests, three of which fit the pool: nobody is admitted to be
    bound to the device while others rotate, and everybody gets there. Without asking for room
    many are."""
    world, drafts = World(device=450, host=6_000), Drafts(views * (68 + 75))
    scheduler = Scheduler(world, drafts=drafts)
    if not asked:
        scheduler.rotation.room = None
    scheduler.waiting = [(t, 40) for t in texts(8, 16, 90, 120, 0.0)]
    scheduler.run(20_000)
    if asked:
        assert scheduler.bound_beside_rotating == 0
        assert scheduler.most_together == views
    else:
        assert scheduler.bound_beside_rotating > 0
    finish(world, scheduler, 16)


class Foreseen(StepWatch):
    """Steps and rounds of a known length."""

    def __init__(self, round_s: float) -> None:
        super().__init__(1e9, WIDTH - 1)
        self.round_s, self.step_s, self.forward_s = round_s, 0.02, 0.002
        self.round_tokens = self.whole_tokens = 3.0

    def step(self, committed, turns, whole, forwards) -> None:
        pass


@pytest.mark.parametrize("pays", [True, False])
def test_rotation_has_to_pay(pays):
    """Catches rotation for the waiting queue where it is slower than letting it wait, and steps
    that are short for a link that brings nothing."""
    world = World(device=550, host=6_000)
    scheduler = Scheduler(world, watch=Foreseen(round_s=2.0 if pays else 0.02))
    scheduler.waiting = [(t, 40) for t in texts(8, 16, 90, 130, 0.0)]
    shortened = set()

    def look(step: int) -> None:
        share = scheduler.rotation.paced(Choice(WIDTH - 1, True, WIDTH - 1)).share
        if share < WIDTH - 1:
            shortened.add(any(state.rotates for state in scheduler.states.values()))

    scheduler.run(20_000, look)
    assert shortened == ({True} if pays else set())
    assert (scheduler.most_together > 3) == pays
    assert (scheduler.rotation.numbers().detachments > 0) == pays
    finish(world, scheduler, 16)


def with_a_fetch_under_way() -> tuple[World, Rotation, Request]:
    """And the request that it is for."""
    world = World(device=400, host=2_000)
    rotation = Rotation(world.residency, world.allocator, WIDTH, 40)
    req = world.admit([n % 50 for n in range(100)])
    world.residency.detach(world.residency.seat_of(req), 0)
    other = world.admit([51] * 390)
    world.end(other, checkpoint=False)
    assert world.residency.order(world.residency.seat_of(req))
    assert world.residency._loads
    return world, rotation, req


@pytest.mark.parametrize(
    "session",
    [
        pytest.param(None, id="no session"),
        pytest.param(SimpleNamespace(streaming=False), id="session"),
        pytest.param(SimpleNamespace(streaming=True, session_id="s"), id="streaming session"),
    ],
)
def test_a_prefill_waits_for_what_it_reads(session):
    """Catches a prompt that reads a prefix whose bytes are under way. Requests of sessions are not
    moved themselves, but their first prompt matches what others have."""
    world, rotation, req = with_a_fetch_under_way()
    newcomer = Request("newcomer", [*req.text, 7, 8, 9])
    newcomer.session, newcomer.last_node = session, req.last_node
    newcomer.lock = world.cache.lock(req.last_node)
    world.cache.maybe_hand_to_session(newcomer)  # where SGLang gives it a row
    rotation.before_extend(SimpleNamespace(chunked_req=None, reqs=[newcomer]))
    assert not world.residency._loads
    world.close()


def test_who_has_come_is_read_before_it_leaves_again():
    """Catches a path that is fetched for nothing; and, drafting ahead, a request that could never
    leave again because something is drafted behind each of its verifications."""
    world, rotation, req = with_a_fetch_under_way()
    seat, committed = world.residency.seat_of(req), [len(req.text) - 1]
    state = SimpleNamespace(view=object(), released=False, drafted=0, full=False, horizon=5)
    req.sampling_params.max_new_tokens = 40

    def may_leave() -> bool:
        return rotation._runner(seat, state, committed[0]).movable

    while seat.place is not Place.ATTACHED:
        world.arrive(0.05)
    state.full = True
    for state.drafted in (0, 5):
        assert not may_leave()
    rotation.check([req], [state], committed, RoundPlan((), ((0, 5),), ()))
    assert not may_leave()
    rotation.check([req], [state], committed, RoundPlan((), (), ((0, 5),), ahead=((0, 5),)))
    assert may_leave()
    world.close()


@pytest.mark.parametrize(
    ("between", "built", "waits_for"),
    [
        pytest.param((), False, "reads", id="only drafts"),
        pytest.param((), True, None, id="a view was built"),
        pytest.param(("prefill",), False, None, id="a prefill"),
        pytest.param(("step",), False, None, id="a step whose drafts came first"),
    ],
)
def test_what_a_fetch_waits_for(monkeypatch, between, built, waits_for):
    """Catches bytes that arrive where the device still reads others: only drafts lie between the
    last read that a step has marked and the next step, or the mark is not taken."""
    world = World(device=400, host=2_000)
    rotation = Rotation(world.residency, world.allocator, WIDTH, 40)
    req = world.admit([n % 50 for n in range(100)])
    req.sampling_params.max_new_tokens = 40
    state = SimpleNamespace(view=object(), released=False, drafted=0, full=True, rotates=False)
    asked = []
    monkeypatch.setattr(world.residency, "mark_reads", lambda: "reads")
    monkeypatch.setattr(world.residency, "order", lambda seat, reads: asked.append(reads))

    def step(views_built: bool) -> None:
        rotation.step([req], [state], [len(req.text) - 1], views_built)

    step(False)
    rotation.only_drafts_follow()
    for what in between:
        if what == "prefill":
            rotation.before_extend(SimpleNamespace(chunked_req=None, reqs=[]))
        else:
            step(False)
    world.residency.detach(world.residency.seat_of(req), 0)
    step(built)
    assert asked == [waits_for]
    world.close()


def test_damage_is_computed_again_before_anything_is_overwritten():
    """With checksums a step may compute between its beginning and a fetch: nothing is marked."""
    world = World(device=400, host=2_000, checks=True)
    world.residency._loads.mark = lambda: "everything"
    assert world.residency.mark_reads() is None
    world.close()


def test_aborts_in_every_state():
    """Whatever a request is doing: the others go on, and nothing is left."""
    world = World(device=450, host=6_000)
    scheduler = Scheduler(world)
    scheduler.waiting = [(t, 60) for t in texts(6, 40, 60, 140, 0.4)]
    rng = random.Random(2)
    ended = {place: 0 for place in Place}

    def abort(step: int) -> None:
        if world.requests and rng.random() < 0.15:
            # The rarest state first: which ones a step meets hangs on the loader thread's pace.
            places = {req: world.residency.seat_of(req).place for req in world.requests}
            req = min(places, key=lambda req: (ended[places[req]], rng.random()))
            ended[places[req]] += 1
            del scheduler.left[req.rid]
            world.end(req, checkpoint=rng.random() < 0.7)

    scheduler.run(20_000, abort)
    assert all(ended.values()), ended
    assert len(scheduler.done) + sum(ended.values()) == 40
    world.check_idle()
    world.close()


def end_the_thread(jobs) -> None:
    raise SystemExit("killed")


def test_the_loader_is_killed(caplog):
    """In the middle of it all: everybody gets there, attached only from then on."""
    world = World(device=450, host=6_000)
    scheduler = Scheduler(world)
    scheduler.waiting = [(t, 60) for t in texts(6, 24, 60, 140, 0.2)]
    at = {}

    def kill(step: int) -> None:
        if step == 60:
            assert scheduler.rotation.numbers().active
            world.copier.submit = end_the_thread
        if not world.loader.alive and not at:
            at["detachments"] = scheduler.rotation.numbers().detachments

    scheduler.run(20_000, kill)
    numbers = scheduler.rotation.numbers()
    assert not numbers.active and numbers.late + numbers.failed > 0
    assert numbers.detachments == at["detachments"], "somebody was detached without a loader"
    assert "is lost (it has ended)" in caplog.text
    finish(world, scheduler, 24)
