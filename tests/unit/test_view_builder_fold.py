"""Folding a long tail, and drafting from what results."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from view_fakes import DIM, HEADS, LAYERS, RECENT, World, each_head

from sglang_vericache.compressors.scorers.keydiff import KeyDiff
from sglang_vericache.kernels.draft_attention import draft_attention
from sglang_vericache.tree import tail_fold

# float32 sums over at most 8 dimensions and 700 rows, compared with float64.
TOLERANCE = 5e-6


def grown(world: World, end: int = 500, tail: int = 150, row: int = 1, path=()):
    """A view whose tail holds ``tail`` tokens."""
    view = world.open(row, end, path)
    world.commit(view, end, end + tail)
    return view


def test_the_tail_follows_the_spans():
    """Catches accepted tokens written one row off, in another order or without their values."""
    world = World()
    view = grown(world, 500, 150)
    for _, _, positions in each_head(world.tokens_of(view, 650)):
        assert positions[100:] == list(range(500, 650))
    assert world.held([view]) == world.used == view.capacity


def test_fold_keeps_the_recent_tokens_in_order():
    """Catches recent tokens that are compressed or reordered, an older part that is dropped or
    exceeds its share, and slots of the folded part that are not given back."""
    world = World()
    view = grown(world, 500, 150)
    before = world.tokens_of(view, 650)
    spare = view.capacity - view.length(650)
    assert world.views.fold([(view, 650)])[0]
    share = 18  # of 118, a fifth of 586 tokens, what falls to 86 of them
    assert [(s.start, s.end, s.rows) for s in view.spans] == [(0, 500, 100), (500, 586, share)]
    assert view.length(650) == 100 + share + RECENT
    assert world.rows.offsets[1] == view.length(650) - 650
    for layer, head, positions in each_head(world.tokens_of(view, 650)):
        assert positions[:100] == before[layer][head][:100], "the span is immutable"
        folded = positions[100 : 100 + share]
        assert folded == sorted(set(folded)) and set(folded) <= set(range(500, 586))
        assert positions[100 + share :] == list(range(586, 650))
    assert view.capacity == view.length(650) + spare
    assert world.held([view]) == world.used == view.capacity
    assert (world.counters.built, world.counters.folded) == (1, 1)
    world.views.close(view)
    assert world.used == 0


def test_fold_keeps_what_differs_most():
    """Catches a fold that scores other rows than the tail's, or gathers others than it scored:
    ten keys of the folded part point away from all the rest, so KeyDiff must keep them."""
    world = World(scorer=KeyDiff())
    odd = [501, 502, 520, 533, 534, 535, 550, 561, 577, 585]
    for keys in world.full.keys:
        keys[world.full.slots(1, 500, 650), :, 1:] = 1 + 0.01 * torch.randn(150, HEADS, DIM - 1)
        keys[world.full.row_table[1, odd].long()] *= -1
    view = grown(world, 500, 150)
    assert world.views.fold([(view, 650)])[0]
    assert view.spans[1].rows >= len(odd)
    for _, _, positions in each_head(world.tokens_of(view, 650)):
        assert set(odd) <= set(positions[100 : view.span_rows])


def test_fold_by_the_scorer_itself():
    """Catches a tail that KeyDiff rates although the scorer asked for needs no queries."""
    world = World()
    view = grown(world, 500, 150)
    assert world.views.fold([(view, 650)])[0]
    rows = view.spans[1].rows
    for layer, head, positions in each_head(world.tokens_of(view, 650)):
        slots = world.full.slots(1, 500, 586)
        value = world.full.values[layer][slots, head, 0].tolist()
        best = sorted(sorted(range(86), key=lambda i: -value[i])[:rows])
        assert positions[100 : 100 + rows] == [500 + i for i in best]


def test_drafting_goes_on_after_a_fold():
    """Catches a view whose length and slots no longer agree once the next tokens arrive."""
    world = World()
    view = grown(world, 500, 150)
    assert world.views.fold([(view, 650)])[0]
    world.commit(view, 650, 710)
    assert world.views.fold([(view, 710)])[0]
    world.commit(view, 710, 715)
    for _, _, positions in each_head(world.tokens_of(view, 715)):
        assert positions[view.span_rows :] == list(range(646, 715))
    assert [(s.start, s.end) for s in view.spans] == [(0, 500), (500, 586), (586, 646)]
    assert world.held([view]) == world.used == view.capacity


def test_fold_before_what_is_drafted():
    """Catches drafted rows that a fold loses, moves or takes for committed ones: with drafting
    ahead, something is drafted behind a tail whenever it is folded."""
    world = World()
    view = grown(world, 500, 150)
    world.commit(view, 650, 657)  # seven drafts
    assert world.views.fold([(view, 650)])[0]
    assert (view.tail_start, view.length(657) - view.length(650)) == (586, 7)
    for _, _, positions in each_head(world.tokens_of(view, 657)):
        assert positions[view.span_rows :] == list(range(586, 657))
    assert world.held([view]) == world.used == view.capacity


def test_fold_without_room_in_the_budget_selects_all_anew():
    """Catches views that grow past the row limit fold by fold, and old spans that are kept."""
    world = World(keep_ratio=None, keep_tokens=200)
    view = grown(world, 400, 164)
    end, rebuilt = 564, False
    for _ in range(4):
        assert world.views.fold([(view, end)])[0]
        assert view.span_rows <= world.views.budget.limit_rows(end - RECENT)
        assert view.tail_start == end - RECENT
        for _, _, positions in each_head(world.tokens_of(view, end)):
            assert positions == sorted(set(positions)), "no token twice, in path order"
            assert positions[view.span_rows :] == list(range(end - RECENT, end))
        assert world.held([view]) == world.used == view.capacity
        rebuilt |= len(view.spans) == 1
        world.commit(view, end, end + 100)
        end += 100
    assert rebuilt, "the budget never ran out"
    world.views.close(view)
    assert world.used == 0


def test_a_path_grows_past_the_floor():
    """Catches folds that drop tokens while all are to be kept, folds that keep most of a tail where
    the floor alone would, and paths that are selected anew, by one request after the other, for
    want of room."""
    world = World(keep_ratio=0.5, keep_min_tokens=400)
    view, end = grown(world, 200, 100), 300
    while end < 1100:
        assert world.views.fold([(view, end)])[0]
        covered = end - RECENT
        if covered <= 400:
            assert view.span_rows == covered
        elif covered - 100 >= 400:
            assert view.spans[-1].rows == 50
        assert min(covered, 400) <= view.span_rows <= world.views.budget.folded_limit_rows(covered)
        assert world.held([view]) == world.used == view.capacity
        world.commit(view, end, end + 100)
        end += 100
    assert world.views.counters.built == 1 and world.views.counters.folded == 8
    assert [span.rows for span in view.spans][:4] == [200, 36, 100, 64]
    world.tokens_of(view, end)


def test_a_short_path_folds_beside_a_long_one():
    """Catches a long path that keeps all of its tail because a short one does, and slots of a tail
    kept whole that are copied, or given back."""
    world = World(keep_ratio=0.2, keep_min_tokens=250)
    long, short = grown(world, 900, 164), grown(world, 100, 164, row=2)
    row = world.rows.table[2, : short.capacity].clone()
    assert world.views.fold([(long, 1064), (short, 264)]) == [True, True]
    assert [(s.end, s.rows) for s in long.spans] == [(900, 250), (1000, 20)]
    assert [(s.end, s.rows) for s in short.spans] == [(100, 100), (200, 100)]
    assert world.counters.built == 2 and world.counters.folded == 2
    assert torch.equal(world.rows.table[2, : short.capacity], row)
    assert world.held([long, short]) == world.used
    world.tokens_of(long, 1064)
    world.tokens_of(short, 264)


def test_selecting_anew_keeps_sinks_and_recent_tokens():
    """Catches a rebuild with the fold's rule, which keeps no recent tokens of its own."""
    world = World(keep_ratio=None, keep_tokens=1)
    view = grown(world, 500, 150)
    assert world.views.fold([(view, 650)])[0]
    assert [s.rows for s in view.spans] == [68, 1], "the limit of 69 is reached"
    world.commit(view, 650, 750)
    assert world.views.fold([(view, 750)])[0]
    assert [(s.start, s.end, s.rows) for s in view.spans] == [(0, 686, 68)]
    for _, _, positions in each_head(world.tokens_of(view, 750)):
        assert positions == [0, 1, 2, 3, *range(622, 686), *range(686, 750)]


def test_fold_of_shared_spans_leaves_the_other_view_alone():
    """Catches a fold that writes into slots which another request reads."""
    world = World(keep_ratio=None, keep_tokens=200)
    path = [world.node(7, 0, 400)]
    view = grown(world, 400, 164, path=path)
    world.share(2, 1, 400)
    other = world.open(2, 400, [world.node(7, 0, 400)])
    before = world.tokens_of(other, 400)
    for end in (564, 664, 764):
        assert world.views.fold([(view, end)])[0]
        world.commit(view, end, end + 100)
        assert world.tokens_of(other, 400) == before
        assert world.held([view, other]) == world.used
    world.views.close(view)
    assert world.tokens_of(other, 400) == before
    assert world.held([other]) == world.used


@pytest.mark.parametrize("anew", [False, True], ids=["fold", "anew"])
def test_fold_without_memory_changes_nothing(anew):
    """Catches a view that is half folded when the pool is full: it must go on as it was, until
    its request is sent to plain decoding."""
    world = World(keep_ratio=None, keep_tokens=1)
    view, end = grown(world, 500, 150), 650
    if anew:
        assert world.views.fold([(view, 650)])[0]
        world.commit(view, 650, 750)
        end = 750
    rest = world.pool.allocator.take(world.pool.allocator.free_count)
    before, capacity = world.tokens_of(view, end), view.capacity
    assert not world.views.fold([(view, end)])[0]
    assert world.tokens_of(view, end) == before
    assert (view.capacity, world.counters.no_memory) == (capacity, 1)
    world.views.close(view)
    world.pool.allocator.give(rest)
    assert world.used == 0


@pytest.mark.parametrize("folds", [0, 1, 2])
def test_a_view_of_everything_is_full_attention(folds):
    """Catches any token missing, doubled or out of its head, after opening and after folds: with
    nothing left out, draft attention over the view is attention over the full KV."""
    world = World(keep_ratio=1.0)
    view, end = grown(world, 500, 150), 650
    for _ in range(folds):
        assert world.views.fold([(view, end)])[0]
        world.commit(view, end, end + 50)
        end += 50
    assert view.length(end) == end
    query = torch.randn(1, 1, 2 * HEADS, DIM)
    slots = world.full.slots(1, 0, end)
    for layer in range(LAYERS):
        found = draft_attention(
            query,
            world.pool.storage,
            layer,
            world.rows.table,
            torch.tensor([1]),
            torch.tensor([view.length(end)]),
            world.full.scaling,
        )
        keys, values = world.full.keys[layer][slots], world.full.values[layer][slots]
        for head in range(2 * HEADS):
            q = query[0, 0, head].double().numpy()
            logits = keys[:, head // 2].double().numpy() @ q * DIM**-0.5
            weights = np.exp(logits - logits.max())
            wanted = weights / weights.sum() @ values[:, head // 2].double().numpy()
            np.testing.assert_allclose(found[0, 0, head].numpy(), wanted, atol=TOLERANCE)


def test_tails_fold_together():
    """Catches rows of one tail that land in another's span, tails of different lengths that are
    folded past their recent tokens, and a fold in parts that differs from one at once."""
    found = []
    for most in (1 << 40, 1):
        torch.manual_seed(0)
        world = World()
        views = [(grown(world, 500, 150), 650), (grown(world, 400, 200, row=2), 600)]
        with mock.patch.object(tail_fold, "MOST_DECODED_BYTES", most):
            assert world.views.fold(views) == [True, True]
        assert [[(s.start, s.end) for s in v.spans] for v, _ in views] == [
            [(0, 500), (500, 586)],
            [(0, 400), (400, 486)],
        ]
        assert world.held([view for view, _ in views]) == world.used
        for view, committed in views:
            for _, _, positions in each_head(world.tokens_of(view, committed)):
                start, end = view.spans[1].start, view.spans[1].end
                folded = positions[view.spans[0].rows : view.span_rows]
                assert folded == sorted(set(folded)) and set(folded) <= set(range(start, end))
                assert positions[view.span_rows :] == list(range(end, committed))
        found.append([world.tokens_of(view, committed) for view, committed in views])
    assert found[0] == found[1]


def test_a_tail_without_memory_does_not_keep_others_from_folding():
    """Catches an answer for all where each view has its own."""
    world = World()
    first, second = grown(world, 500, 150), grown(world, 400, 150, row=2)
    room = 20  # for one share of about 18 rows
    rest = world.pool.allocator.take(world.pool.allocator.free_count - room)
    assert world.views.fold([(first, 650), (second, 550)]) == [True, False]
    assert (len(first.spans), len(second.spans)) == (2, 1)
    world.pool.allocator.give(rest)
    assert world.held([first, second]) == world.used
