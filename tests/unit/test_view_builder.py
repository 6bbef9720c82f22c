"""Opening and closing draft views: what they hold, and where every slot is."""

from __future__ import annotations

import pytest
import torch
from view_fakes import LONGEST, World, each_head

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.tree.view_plan import PathNode


@pytest.mark.parametrize(
    ("end", "settings", "rows"),
    [
        pytest.param(500, {}, 100, id="fifth"),
        pytest.param(100, {}, 68, id="least"),
        pytest.param(30, {}, 30, id="shorter-than-the-least"),
        pytest.param(500, {"keep_ratio": None, "keep_tokens": 90}, 90, id="tokens"),
        pytest.param(500, {"keep_ratio": 1.0}, 500, id="all"),
    ],
)
def test_a_new_path(end, settings, rows):
    """Catches rows filled with other tokens than the scorer's best, heads that share a selection,
    and slots that are not accounted for before, during or after."""
    world = World(**settings)
    view = world.open(1, end)
    assert (view.tail_start, view.span_rows, view.length(end)) == (end, rows, rows)
    assert world.rows.offsets.tolist() == [0, rows - end, 0, 0, 0]
    for layer, head, positions in each_head(world.tokens_of(view, end)):
        assert positions == world.best(1, layer, head, 0, end, rows, end)
    assert world.held([view]) == world.used == rows
    assert (world.counters.built, world.counters.reused, len(world.spans)) == (1, 0, 0)
    world.views.close(view)
    assert world.used == 0


def test_a_span_belongs_to_the_node_where_it_ends():
    """Catches a span that goes with its request, so that the next one selects it again."""
    world = World()
    view = world.open(1, 500, [world.node(7, 0, 500)])
    assert world.spans.get(7) is view.spans[0]
    world.views.close(view)
    assert world.held([]) == world.used == 100
    world.spans.drop(7)
    assert world.used == 0


def test_the_same_prompt_reuses_the_span():
    """Catches a second copy of the same selection, and slots freed while another view reads."""
    world = World()
    world.share(2, 1, 500)
    first = world.open(1, 500, [world.node(7, 0, 500)])
    second = world.open(2, 500, [world.node(7, 0, 500)])
    assert second.spans[0] is first.spans[0]
    assert (world.counters.built, world.counters.reused) == (1, 1)
    assert world.tokens_of(second, 500) == world.tokens_of(first, 500)
    assert world.held([first, second]) == world.used == 100
    world.views.close(first)
    world.spans.drop(7)
    assert world.held([second]) == world.used == 100
    assert len(world.tokens_of(second, 500)[0][0]) == 100
    world.views.close(second)
    assert world.used == 0


def test_the_next_turn_adds_to_the_span():
    """Catches an addition scored from the wrong positions or written before the reused rows."""
    world = World()
    world.views.close(world.open(1, 500, [world.node(7, 0, 500)]))
    view = world.open(1, 600, [world.node(7, 0, 500), world.node(8, 500, 600)])
    assert [(span.start, span.end, span.rows) for span in view.spans] == [
        (0, 500, 100),
        (500, 600, 64),
    ]
    assert world.spans.get(8) is view.spans[1]
    for layer, head, positions in each_head(world.tokens_of(view, 600)):
        assert positions[:100] == world.best(1, layer, head, 0, 500, 100, 500)
        assert positions[100:] == world.best(1, layer, head, 500, 600, 64, 600)
    assert world.held([view]) == world.used == 164


def test_a_fork_gives_two_spans():
    """Catches both parts owned by one node, or the second scored over the first one's tokens."""
    world = World()
    view = world.open(1, 600, [world.node(7, 0, 480, children=2), world.node(8, 480, 600)])
    assert [(span.start, span.end) for span in view.spans] == [(0, 480), (480, 600)]
    assert (world.spans.get(7), world.spans.get(8)) == tuple(view.spans)
    first, second = view.spans[0].rows, view.spans[1].rows
    for layer, head, positions in each_head(world.tokens_of(view, 600)):
        assert positions[:first] == world.best(1, layer, head, 0, 480, first, 600)
        assert positions[first:] == world.best(1, layer, head, 480, 600, second, 600)
    assert world.held([view]) == world.used == first + second


def test_a_fork_fits_its_row():
    """Catches two parts that each take a budget in tokens: writing their slots beyond the row's
    width is an assertion that stops the server."""
    world = World(keep_ratio=None, keep_tokens=600)
    view = world.open(1, 1200, [world.node(7, 0, 640, children=2), world.node(8, 640, 1200)])
    assert len(view.spans) == 2
    assert world.views.reserve(view, view.length(1200) + world.config.tail_capacity)
    assert world.held([view]) == world.used


def test_a_checkpoint_gives_private_spans_to_their_nodes():
    """Catches spans owned by a node that ends elsewhere, and references lost or doubled when a
    checkpoint is repeated."""
    world = World()
    view = world.open(1, 500)
    path = [PathNode(7, 0, 300, 1), PathNode(8, 300, 500, 1)]
    for _ in range(2):
        world.views.adopt(view, path)
        assert world.spans.owners() == [8]
        assert world.held([view]) == world.used == 100
    world.views.close(view)
    assert world.held([]) == world.used == 100


def test_reserve_gives_slots_in_blocks():
    """Catches an allocation every round, and slots that the row does not know of."""
    world = World()
    view = world.open(1, 500)
    assert world.views.reserve(view, view.length(500) + 5)
    assert view.capacity == 132, "one block of 32"
    assert world.views.reserve(view, 132)
    assert view.capacity == 132, "nothing was missing"
    assert world.views.reserve(view, 170)
    assert view.capacity == 170, "38 are more than a block"
    assert world.held([view]) == world.used == 170
    world.views.close(view)
    assert world.used == 0


@pytest.mark.parametrize("short_of_the_end", [2, 0], ids=["block-is-cut", "all-that-is-left"])
def test_reserve_to_the_end_of_the_row(short_of_the_end):
    """Catches a block that does not fit the row though what is missing does."""
    world = World()
    view = world.open(1, 1200)
    width = world.rows.width
    assert world.views.reserve(view, width - 3)
    assert world.views.reserve(view, width - short_of_the_end)
    assert view.capacity == width
    assert world.held([view]) == world.used == width
    with pytest.raises(AssertionError, match="cannot grow"):
        world.views.reserve(view, width + 1)


def test_reserve_takes_less_than_a_block_when_memory_is_short():
    """Catches a request that is sent back to plain decoding although its tokens would fit."""
    world = World(slots=110)
    view = world.open(1, 500)
    assert world.views.reserve(view, 108)
    assert (view.capacity, world.used) == (108, 108)
    assert not world.views.reserve(view, 111)
    assert (view.capacity, world.used, world.counters.no_memory) == (108, 108, 1)
    assert world.held([view]) == 108
    world.views.close(view)
    assert world.used == 0


def test_a_full_pool_evicts_idle_spans():
    """Catches a view refused while memory is only held by spans that nobody reads."""
    world = World(slots=250)
    world.views.close(world.open(1, 500, [world.node(7, 0, 500)]))
    reading = world.open(2, 500, [world.node(8, 0, 500)])
    view = world.open(3, 500, [world.node(9, 0, 500)])
    assert (7 in world.spans, 8 in world.spans, 9 in world.spans) == (False, True, True)
    assert (world.counters.evicted, world.counters.no_memory) == (1, 0)
    assert world.held([reading, view]) == world.used == 200
    for row, shown in ((2, reading), (3, view)):
        for layer, head, positions in each_head(world.tokens_of(shown, 500)):
            assert positions == world.best(row, layer, head, 0, 500, 100, 500)


def test_reuse_keeps_a_span_from_eviction():
    """Catches eviction by age: the prompt that everyone sends would go first."""
    world = World(slots=250)
    for row in (1, 2, 1):
        world.views.close(world.open(row, 500, [world.node(row, 0, 500)]))
    world.open(3, 500)
    assert (1 in world.spans, 2 in world.spans) == (True, False)


def test_spans_about_to_be_reused_are_not_evicted_for_the_rest():
    """Catches the reused part of a view evicted to make room for the part that is built."""
    world = World(slots=230)
    world.views.close(world.open(1, 500, [world.node(7, 0, 500)]))
    world.views.close(world.open(2, 500, [world.node(8, 0, 500)]))
    view = world.open(1, 600, [world.node(7, 0, 500), world.node(9, 500, 600)])
    assert (7 in world.spans, 8 in world.spans, 9 in world.spans) == (True, False, True)
    assert world.held([view]) == world.used == 164


@pytest.mark.parametrize(
    ("slots", "path", "left"),
    [
        pytest.param(99, [], 0, id="first-build"),
        pytest.param(150, [PathNode(7, 0, 480, 2)], 96, id="second-build-of-a-fork"),
    ],
)
def test_out_of_memory_leaks_nothing(slots, path, left):
    """Catches slots of the parts that did fit; a part that a node owns stays there, idle."""
    world = World(slots=slots)
    end = 600 if path else 500
    assert world.open(1, end, path) is None
    assert world.counters.no_memory == 1
    assert world.held([]) == world.used == left
    assert not world.rows.table.any()
    world.spans.clear()
    assert world.used == 0


def test_out_of_memory_gives_reused_spans_back():
    """Catches a reference to a reused span that a failed view keeps for ever."""
    world = World(slots=150)
    reading = world.open(1, 500, [world.node(7, 0, 500)])
    world.share(2, 1, 500)
    assert world.open(2, 600, [world.node(7, 0, 500)]) is None
    assert world.held([reading]) == world.used == 100
    world.views.close(reading)
    assert world.held([]) == world.used == 100


def test_two_paths_never_share_slots():
    """Catches a row written into another request's."""
    world = World()
    views = [world.open(row, 300 + 100 * row) for row in (1, 2, 3)]
    assert world.held(views) == world.used
    for row, view in zip((1, 2, 3), views, strict=True):
        end = 300 + 100 * row
        for layer, head, positions in each_head(world.tokens_of(view, end)):
            assert positions == world.best(row, layer, head, 0, end, view.span_rows, end)


def test_the_main_pool_is_only_read():
    """Catches anything written into the full KV, which would change the tokens themselves."""
    world = World()
    before = torch.stack([*world.full.keys, *world.full.values])
    view = world.open(1, 500)
    world.commit(view, 500, 640)
    assert world.views.fold([(view, 640)])[0]
    world.views.close(view)
    assert torch.equal(torch.stack([*world.full.keys, *world.full.values]), before)


def test_a_request_with_a_budget_of_its_own():
    """Catches spans, limits and folds that follow the server's ratio instead of the request's."""
    world = World(keep_ratio=0.2)
    budget = world.views.budget_of(0.5)
    view = world.open(1, 400, [world.node(7, 0, 400)], budget=budget)
    assert (view.span_rows, view.budget) == (200, budget)
    assert world.views.budget_of(None) == world.views.budget
    # A request of the server's own ratio reads it too, and is as generous from there on.
    world.share(2, 1, 400)
    other = world.open(2, 440, [world.node(7, 0, 400), world.node(8, 400, 440)])
    assert other.spans[0] is view.spans[0]
    assert (other.spans[1].rows, other.budget) == (40, budget)
    world.commit(other, 440, 640)
    assert world.views.fold([(other, 640)])[0]
    assert other.spans[-1].budget == budget
    assert world.held([view, other]) == world.used


def test_a_span_that_keeps_too_little_is_replaced():
    """Catches a request that gets less than it asked for, and a node that keeps the lesser span:
    each such request would select anew."""
    world = World(keep_ratio=0.2)
    first = world.open(1, 500, [world.node(7, 0, 500)])
    world.share(2, 1, 500)
    second = world.open(2, 500, [world.node(7, 0, 500)], budget=world.views.budget_of(0.4))
    assert (first.span_rows, second.span_rows) == (100, 200)
    assert world.spans.get(7) is second.spans[0]
    assert world.counters.reused == 0
    world.share(3, 1, 500)
    third = world.open(3, 500, [world.node(7, 0, 500)], budget=world.views.budget_of(0.3))
    assert third.spans == second.spans
    assert world.held([first, second, third]) == world.used


@pytest.mark.parametrize("ratio", [0.2, 0.25, 1.0])
def test_a_budget_larger_than_a_row(ratio):
    """Catches a row that overflows, at once or when tails are folded into it: it is as wide as
    the server's own ratio needs of the longest context."""
    world = World(keep_ratio=0.2)
    view = world.open(1, 300, budget=world.views.budget_of(ratio))
    width = world.config.verify_width
    for committed in range(300, LONGEST - width + 1, width):
        if view.tail_tokens(committed) > world.config.fold_tail_tokens:
            assert world.views.fold([(view, committed)])[0]
        world.commit(view, committed, committed + width)
    assert view.span_rows <= Budget.of(world.config).limit_rows(LONGEST)
    assert world.held([view]) == world.used
