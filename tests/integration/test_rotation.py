"""Requests that need several times the pool, scheduled as SGLang would, on its own radix cache."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import cpu_engine
import pytest

cpu_engine.required()

from rotation_scheduler import WIDTH, Drafts, Scheduler, texts  # noqa: E402
from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from tree_world import Request, World, settings  # noqa: E402, F401

from sglang_vericache.loader.planner import Place  # noqa: E402
from sglang_vericache.rounds.pace import Choice  # noqa: E402
from sglang_vericache.rounds.policy import RoundPlan  # noqa: E402
from sglang_vericache.rounds.rotation import Rotation  # noqa: E402
from sglang_vericache.rounds.step_watch import StepWatch  # noqa: E402


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


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "drafting ahead"])
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

    def __init__(self, round_s: float | None, loses: bool = False) -> None:
        super().__init__(1e9, WIDTH - 1)
        self.round_s, self.step_s, self.forward_s, self.loses = round_s, 0.02, 0.002, loses
        self.round_tokens = self.whole_tokens = 3.0

    def step(self, committed, turns, whole, forwards, rotating=None) -> None:
        pass

    @property
    def rotation_loses(self) -> bool:
        return self.loses


def test_rotation_does_not_pay_where_memory_is_plenty():
    """Catches an answer that outlives the queue that it was given for: prompts of later requests
    would be left to their prefills, for the link's sake."""
    world = World(device=550, host=6_000)
    scheduler = Scheduler(world, watch=Foreseen(2.0))
    scheduler.waiting = [(t, 40) for t in texts(5, 6, 90, 130, 0.0)]
    paid = []
    scheduler.run(20_000, lambda step: paid.append(scheduler.rotation.pays))
    assert any(paid) and scheduler.rotation.numbers().detachments > 0
    scheduler.waiting = [(t, 20) for t in texts(6, 2, 40, 50, 0.0)]
    scheduler.run(20_000)
    assert not scheduler.rotation.pays
    world.check_idle()
    world.close()


@pytest.mark.parametrize(
    ("round_s", "loses", "pays"),
    [(2.0, False, True), (0.02, False, False), (None, False, False), (2.0, True, False)],
    ids=["foreseen", "not-foreseen", "unknown", "measured"],
)
def test_rotation_has_to_pay(round_s, loses, pays):
    """Catches rotation for the waiting queue where it is slower than letting it wait, or where
    nobody knows, and steps that are short for a link that brings nothing."""
    world = World(device=550, host=6_000)
    scheduler = Scheduler(world, watch=Foreseen(round_s, loses))
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


class Holding:
    """Lets requests in only three at a time, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def holds(self, fitting: int, waiting: int) -> bool:
        self.asked.append((fitting, waiting))
        return 0 < fitting < min(3, waiting)


@pytest.mark.parametrize("pays", [True, False], ids=["rotating", "staying"])
def test_requests_that_are_let_in_together(pays):
    """Catches a queue that is held up while rotation makes room for it, and requests that are
    asked about alone although others come in the same pass."""
    world, admission = World(device=550, host=6_000), Holding()
    world.cache.admission = admission
    scheduler = Scheduler(world, watch=None if pays else Foreseen(0.02))
    scheduler.waiting = [(t, 40) for t in texts(8, 16, 90, 130, 0.0)]
    scheduler.run(20_000)
    if pays:
        assert admission.asked == []
    else:
        assert any(0 < fitting < min(3, waiting) for fitting, waiting in admission.asked)
        assert {waiting for _, waiting in admission.asked} < set(range(1, 17))
        assert max(fitting for fitting, _ in admission.asked) == 550 // (90 + 40)
    finish(world, scheduler, 16)


def test_a_request_of_sglang_is_asked_about():
    """Catches an attribute that only our stand-in for SGLang's request has."""
    world, admission = World(device=550, host=2_000), Holding()
    world.cache.rotation, world.cache.admission = None, admission
    req = Req("r", "", array("q", range(100)), SamplingParams(max_new_tokens=10))
    req.full_untruncated_fill_ids = array("q", range(100))
    assert not world.cache.may_admit(req, 230, 10, 9)
    assert world.cache.may_admit(req, 230, 10, 1) and world.cache.may_admit(req, 230, 10, 0)
    assert admission.asked == [(2, 9), (2, 1)]


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


@pytest.mark.parametrize("checks", [False, True])
def test_damage_is_computed_again_before_anything_is_overwritten(checks):
    """With checksums a step may compute between its beginning and a fetch: nothing is marked.
    Without, the copy is told what was marked, and an event behind the slots themselves."""
    world = World(device=400, host=2_000, checks=checks)
    residency, told = world.residency, []
    loads, fetch = residency._loads, world.loader.fetch
    req = world.admit([n % 50 for n in range(100)])
    seat = residency.seat_of(req)
    residency.detach(seat, 0)
    world.end(world.admit([51] * 390), checkpoint=False)
    loads.mark, loads._on_gpu = iter(("reads", "all", "slots")).__next__, True

    def spy(host_slots, device_slots, after=(), places=None):
        told.append(after)
        return fetch(host_slots, device_slots, (), places)

    world.loader.fetch = spy
    reads = residency.mark_reads()
    assert reads == (None if checks else "reads")
    assert residency.order(seat, reads)
    assert told == [("reads", "all")]
    loads._on_gpu = False
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
