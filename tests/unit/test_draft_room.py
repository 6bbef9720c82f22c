"""Room for one more view: what is free, idle, promised, and what tails will still take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from view_fakes import World

from sglang_vericache.phase_clock import PhaseClock
from sglang_vericache.rounds.draft_room import DraftRoom
from sglang_vericache.rounds.pace import Choice
from sglang_vericache.rounds.view_keeper import ViewKeeper
from sglang_vericache.support import PLAIN_IS_FASTER
from sglang_vericache.tree.view_plan import PathNode

# Of 1,000 tokens: a fifth, and a tail of 200 + 5.
VIEW = 200 + 210


def request(rid: str, tokens: int = 1000) -> SimpleNamespace:
    ids = [0] * tokens
    return SimpleNamespace(rid=rid, full_untruncated_fill_ids=ids, session=None, output_ids=[5])


def state(rid: str, view=None) -> SimpleNamespace:
    return SimpleNamespace(rid=rid, view=view)


def room_of(world: World, states: list, path=()) -> DraftRoom:
    return DraftRoom(world.views, states, lambda req: path, lambda req: world.views.budget)


@pytest.mark.parametrize("slots", [VIEW, VIEW - 1])
def test_free_slots(slots):
    assert room_of(World(slots), []).holds(request("a")) == (slots >= VIEW)


def test_short_contexts_need_none():
    assert room_of(World(400), []).rows_of(request("a", 511)) == 0


def test_tails_grow():
    """Catches slots that running views will need, given to a newcomer."""
    world = World(2 * VIEW)
    view = world.views.open(0, (), 1000, None)
    assert world.pool.allocator.free_count == VIEW + 210
    room = room_of(world, [state("a", view)])
    assert room.holds(request("b"))
    assert world.views.reserve(view, view.capacity + 100) and room.holds(request("b"))
    world.pool.allocator.take(1)
    assert not room.holds(request("b"))


def test_idle_spans():
    """Catches idle spans that do not count, and one that is to be reused counted as free."""
    world = World(VIEW + 200)
    path = (PathNode(7, 0, 1000, 0),)
    view = world.views.open(0, path, 1000, None)
    assert not room_of(world, [state("a", view)]).holds(request("b"))
    world.views.close(view)
    assert world.spans.idle_rows == 200
    assert room_of(world, []).holds(request("b"))
    world.pool.allocator.take(200)
    room = room_of(world, [])
    assert room.holds(request("b")) and world.pool.allocator.free_count == 210


def test_admitted_ones_take_their_room():
    """From admission to the view; and not when they are refused after all."""
    world, states = World(2 * VIEW), []
    room = room_of(world, states)
    for rid in ("a", "b"):
        assert room.holds(request(rid))
        room.admit(request(rid))
    assert not room.holds(request("c")) and room.holds(request("a"))
    room.begin_pass()
    assert room.holds(request("c")), "the prefill did not come"
    room.prefill([request("a"), request("b")])
    room.begin_pass()
    room.step(chunks_follow=True)
    room.step(chunks_follow=False)
    assert not room.holds(request("c"))
    states.append(state("a", world.views.open(0, (), 1000, None)))
    room.step(chunks_follow=False)
    assert world.pool.allocator.free_count == 2 * VIEW - 200
    assert room.holds(request("c")), "b got no view, a has its own"
    room.admit(request("c"))
    assert not room.holds(request("d"))


@pytest.mark.parametrize("needed", [True, False])
def test_views_where_plain_decoding_is_faster(needed):
    """Catches a request that is bound to the device because it need not draft."""
    world = World(2000, min_context_tokens=100)
    tree = SimpleNamespace(holds_prompt=lambda *_: True, path_of=lambda req: ())
    capture = SimpleNamespace(observation=lambda rid: None, forget=lambda rid: None)
    built = []
    pace = SimpleNamespace(
        adapts=True, unusual=lambda: None, built=lambda seconds, tokens: built.append(tokens)
    )
    keeper = ViewKeeper(world.config, world.views, tree, capture, pace, PhaseClock("cpu"), None)
    one = SimpleNamespace(obstacle=None, rotates=False, full=True, view=None, row=0, drafted=0)
    one.prompt_tokens, one.memory_generation, one.budget = 900, -1, world.views.budget
    one.grown, one.may_grow = None, False
    plain = Choice(0, True, 0)
    for _ in range(2):
        reasons = keeper.prepare(
            [SimpleNamespace(rid="a", output_ids=[5])], [one], [901], [99], plain, needed
        )
        assert reasons == [PLAIN_IS_FASTER] and (one.view is not None) == needed
    assert built == [901] * needed, "a view's cost is told once, by its context"
    keeper.prepare([SimpleNamespace(rid="a", output_ids=[5])], [one], [901], [99], plain, False)
    assert one.view is None


@pytest.mark.parametrize(("slots", "rows"), [(1210, 1000), (1209, 200)])
def test_short_contexts_keep_what_there_is_room_for(slots, rows):
    """Catches views that take for a short context what others need to draft at all; and requests
    that wait for the room to keep all of theirs."""
    world = World(slots, keep_min_tokens=1024, min_context_tokens=100)
    one = state("b")
    room = DraftRoom(world.views, [one], lambda req: (), lambda req: world.views.budget)
    assert room.rows_of(request("b")) == VIEW
    tree = SimpleNamespace(holds_prompt=lambda *_: True, path_of=lambda req: ())
    capture = SimpleNamespace(observation=lambda rid: None, forget=lambda rid: None)
    pace = SimpleNamespace(adapts=False, unusual=lambda: None)
    keeper = ViewKeeper(world.config, world.views, tree, capture, pace, PhaseClock("cpu"), room)
    vars(one).update(obstacle=None, rotates=False, full=True, row=0, drafted=0, prompt_tokens=1000)
    one.memory_generation, one.budget = -1, world.views.budget
    one.grown, one.may_grow = None, False
    reasons = keeper.prepare([request("b")], [one], [1001], [99], Choice(4, True, 0))
    assert reasons == [None] and one.view.span_rows == rows
    assert one.budget == world.views.budget, "it may keep more another time"


def test_who_may_draft():
    """Catches requests that are decoded plainly whatever is chosen, counted as drafting."""
    world = World(2000, min_context_tokens=100)
    keeper = ViewKeeper(world.config, world.views, None, None, None, None, None)
    one = SimpleNamespace(obstacle=None, full=True, view=None, memory_generation=-1)
    assert keeper.may_draft(one, 100) and not keeper.may_draft(one, 99)
    for changed in ({"obstacle": "grammar"}, {"full": False}):
        assert not keeper.may_draft(SimpleNamespace(**(vars(one) | changed)), 900)
    one.memory_generation = world.views.pool.allocator.generation
    assert not keeper.may_draft(one, 900)
    one.view = object()
    assert keeper.may_draft(one, 900)
