"""Statistics of queries on their way: computed, kept with a node, used again, or missing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from score_fakes import make_rotary, observe
from view_fakes import DIM, HEADS, LAYERS, World

from sglang_vericache.compressors.query_stats import QueryStats
from sglang_vericache.compressors.scorers.expected_attention import ExpectedAttention
from sglang_vericache.compressors.scorers.keydiff import KeyDiff

ROTARY = make_rotary(DIM, 1200)


@pytest.fixture
def world() -> World:
    return World(scorer=ExpectedAttention(), rotary=ROTARY)


def seen(start: int, end: int) -> QueryStats:
    queries = [torch.randn(end - start, 2 * HEADS, DIM) for _ in range(LAYERS)]
    return observe(ExpectedAttention(), queries, ROTARY, start=start)


def counts(world: World) -> tuple[int, int, int]:
    """Builds scored with (computed, stored, no) statistics."""
    c = world.counters
    return c.scored_with_computed, c.scored_with_stored, c.scored_without


def test_without_statistics_keydiff_scores(world):
    """Catches a scorer called without what it needs, and a fallback that nobody can see."""
    view = world.open(1, 500)
    assert counts(world) == (0, 0, 1)
    assert view.spans[0].scope == "node", "KeyDiff's"


def test_the_next_turn_joins_both(world):
    """Catches statistics of the first turn forgotten, or the second turn's left out, on the node
    from which the third will take them."""
    first, second = seen(0, 500), seen(500, 560)
    world.views.close(world.open(1, 500, [world.node(7, 0, 500)], first))
    view = world.open(1, 560, [world.node(7, 0, 500), world.node(8, 500, 560)], second)
    assert counts(world) == (1, 1, 0)
    known = world.spans.observation(8)
    assert known is view.spans[1].observation
    assert (known.count, known.start, known.end) == (556, 4, 560)
    wanted = first.then(second).moments
    assert torch.equal(known.moments.mean, wanted.mean)
    assert torch.equal(known.moments.variance, wanted.variance)


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_a_checkpoint_before_the_first_round_joins_both(world, checkpoints):
    """Catches the few tokens of a next turn kept alone with its node, where they hide the first
    turn's from the request itself and from all that follow."""
    first, second = seen(0, 500), seen(500, 520)
    world.views.close(world.open(1, 500, [world.node(7, 0, 500)], first))
    path = [world.node(7, 0, 500), world.node(8, 500, 520)]
    for _ in range(checkpoints):
        world.views.remember(path, second)
    assert world.spans.observation(8).count == 516
    world.open(1, 520, path, second)
    assert counts(world) == (1, 1, 0)
    assert world.spans.observation(8).count == 516


def test_too_few_queries_are_not_kept(world):
    """Catches a node that seems to know something, and hides those above it."""
    world.views.remember([world.node(7, 0, 520)], seen(517, 520))
    assert world.spans.observation(7) is None
    assert not world.spans.nodes()


def test_an_identical_prompt_after_its_span_was_evicted(world):
    """Catches statistics that go with the span: all but one token come from the radix cache, so
    there are no others."""
    world.views.close(world.open(1, 500, [world.node(7, 0, 500)], seen(0, 500)))
    world.spans.evict_for(world.pool.slots)
    assert 7 not in world.spans and world.used == 0
    # SGLang computes the last token of a prompt again; the node's id stays with its end.
    path = [world.node(9, 0, 499), world.node(7, 499, 500)]
    view = world.open(1, 500, path, seen(499, 500))
    assert counts(world) == (1, 1, 0)
    assert view.spans[0].scope == "path"
    assert world.spans.observation(7).count == 496


def test_a_fold_that_selects_anew_knows_the_prompt():
    """Catches a fallback to KeyDiff although the view's own span keeps the statistics."""
    world = World(scorer=ExpectedAttention(), rotary=ROTARY, keep_ratio=None, keep_tokens=1)
    view = world.open(1, 500, (), seen(0, 500))
    for end in (650, 750, 850, 950):
        world.commit(view, view.tail_start, end)
        assert world.views.fold([(view, end)])[0]
    assert world.counters.built >= 3, "selected anew, more than once"
    assert counts(world) == (1, world.counters.built - 1, 0)


def test_another_branch_starts_with_its_own(world):
    """Catches the queries of one branch kept with the prefix that both share."""
    path = [world.node(7, 0, 480, children=2), world.node(8, 480, 600)]
    world.open(1, 600, path, seen(0, 600))
    assert world.spans.observation(7) is None
    assert world.spans.observation(8).count == 596


def test_a_private_span_brings_its_statistics_to_the_tree(world):
    """Catches statistics lost where the checkpoint creates the node only later."""
    view = world.open(1, 500, (), seen(0, 500))
    assert world.spans.observation(7) is None
    world.views.adopt(view, [world.node(6, 0, 300), world.node(7, 300, 500)])
    assert world.spans.observation(7).count == 496


@dataclass(frozen=True)
class Spy(ExpectedAttention):
    """Notes where the path ends and which rotary embedding each call is given."""

    asked: list = field(default_factory=list)

    def score(self, inputs):
        self.asked.append((inputs.start, len(inputs.keys), inputs.path_end, inputs.rotary))
        return super().score(inputs)


def test_both_parts_of_a_fork_look_beyond_the_path():
    """Catches a shared prefix rated for queries that would follow itself, and one layer's rotary
    embedding used for all."""
    scorer = Spy()
    world = World(scorer=scorer, rotary=ROTARY)
    rotary = [make_rotary(DIM, 1200, theta=10.0**layer) for layer in range(1, LAYERS + 1)]
    world.views.full = replace(world.full, rotary=rotary)
    path = [world.node(7, 0, 480, children=2), world.node(8, 480, 600)]
    world.open(1, 600, path, seen(0, 600))
    assert scorer.asked == [(0, 480, 600, r) for r in rotary] + [(0, 600, 600, r) for r in rotary]


class Counted(list):
    """Layers of a pool, and how often one was asked for."""

    asked = 0

    def __getitem__(self, layer):
        self.asked += 1
        return super().__getitem__(layer)


@pytest.mark.parametrize(("scorer", "gathers"), [(ExpectedAttention(), 2), (KeyDiff(), 1)])
def test_values_are_gathered_for_those_who_need_them(scorer, gathers):
    """Catches a copy of all values in every layer for a scorer that looks at keys only; the span
    itself takes them once."""
    world = World(scorer=scorer, rotary=ROTARY)
    values = Counted(world.full.values)
    world.views.full = replace(world.full, values=values)
    world.open(1, 500, (), seen(0, 500) if scorer.watch is not None else None)
    assert values.asked == gathers * LAYERS
