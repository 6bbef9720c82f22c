"""Which queries a selection looks through: computed, stored with an earlier span, or none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from view_fakes import DIM, HEADS, LAYERS, World, each_head

from sglang_vericache.compressors.base import Granularity, Need, Scope, ScoreInputs, Scorer
from sglang_vericache.compressors.window import QueryWindow, WindowWatch

LIMIT = 16


@dataclass(frozen=True)
class Witness(Scorer):
    """Notes the positions of the queries it is given, or that it was not asked.

    Attributes:
        seen: positions of each layer's queries, in the order of the calls.
    """

    seen: list[list[int]] = field(default_factory=list)

    name: ClassVar[str] = "witness"
    paper: ClassVar[str] = "none"
    scope: ClassVar[Scope] = "path"
    needs: ClassVar[frozenset[Need]] = frozenset({"keys", "values", "queries"})
    granularity: ClassVar[Granularity] = "head_even"

    @property
    def watch(self) -> WindowWatch:
        return WindowWatch(LIMIT)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.start == 0, "a scorer of path scope sees the whole path"
        positions = inputs.query_positions.tolist()
        # Layer l's query of position p is filled with l * 10000 + p.
        layer = len(self.seen) % LAYERS
        assert inputs.queries[:, 0, 0].tolist() == [layer * 10000 + p for p in positions]
        self.seen.append(positions)
        return inputs.values[:, :, 0].T


def window(start: int, end: int) -> QueryWindow | None:
    positions = torch.arange(start, end)
    values = torch.arange(LAYERS)[:, None] * 10000 + positions
    queries = values.float()[:, :, None, None].expand(-1, -1, 2 * HEADS, DIM)
    return QueryWindow(queries, tuple(range(start, end)), LIMIT) if end > start else None


def counts(world: World) -> tuple[int, int, int]:
    """Builds scored with (computed, stored, no) queries."""
    c = world.counters
    return c.scored_with_computed, c.scored_with_stored, c.scored_without


@pytest.mark.parametrize(
    ("computed", "seen", "counted"),
    [
        pytest.param((484, 500), range(484, 500), (1, 0, 0), id="full-window"),
        pytest.param((492, 500), range(492, 500), (1, 0, 0), id="just-enough"),
        pytest.param((493, 500), None, (0, 0, 1), id="too-few"),
        pytest.param(None, None, (0, 0, 1), id="missing"),
    ],
)
def test_first_build(computed, seen, counted):
    """Catches a score from one or two queries, which says nothing about the path, and a scorer
    that is called without the queries it needs."""
    scorer = Witness()
    world = World(scorer=scorer)
    view = world.open(1, 500, computed=window(*computed) if computed else None)
    assert scorer.seen == ([list(seen)] * LAYERS if seen else [])
    assert counts(world) == counted
    assert view.spans[0].scope == ("path" if seen else "node")


@pytest.mark.parametrize(
    ("stored", "end", "computed", "seen", "counted"),
    [
        pytest.param((484, 500), 560, None, range(484, 500), (0, 1, 0), id="stored"),
        pytest.param(
            (484, 500),
            505,
            (500, 505),
            [*range(489, 500), *range(500, 505)],
            (0, 1, 0),
            id="stored-and-computed",
        ),
        pytest.param(
            (484, 500), 505, (498, 505), range(484, 500), (0, 1, 0), id="computed-overlaps"
        ),
        pytest.param(
            (484, 500), 560, (544, 560), range(544, 560), (1, 0, 0), id="computed-is-enough"
        ),
        pytest.param((484, 500), 564, None, range(484, 500), (0, 1, 0), id="just-recent"),
        pytest.param((484, 500), 565, None, None, (0, 0, 1), id="stored-too-long-ago"),
        pytest.param((484, 500), 565, (560, 565), None, (0, 0, 1), id="both-useless"),
    ],
)
def test_next_turn(stored, end, computed, seen, counted):
    """Catches a short turn that falls back to KeyDiff though the span it continues keeps its
    queries, queries from before the recent tokens, and a window joined in the wrong order."""
    scorer = Witness()
    world = World(scorer=scorer)
    first = world.open(1, 500, [world.node(7, 0, 500)], computed=window(*stored))
    world.views.close(first)
    scorer.seen.clear()
    before = counts(world)
    world.open(1, end, [world.node(7, 0, 500)], computed=window(*computed) if computed else None)
    assert world.counters.reused == 1
    assert scorer.seen == ([list(seen)] * LAYERS if seen else [])
    assert tuple(now - then for now, then in zip(counts(world), before, strict=True)) == counted


def test_an_exact_match_scores_nothing():
    """Catches counters that move although nothing was built."""
    world = World(scorer=Witness())
    world.open(1, 500, [world.node(7, 0, 500)], computed=window(484, 500))
    world.share(2, 1, 500)
    world.open(2, 500, [world.node(7, 0, 500)], computed=window(484, 500))
    assert counts(world) == (1, 0, 0)


def test_the_window_is_kept_with_the_span_that_ends_the_path():
    """Catches the queries of a path's end kept with a shared prefix: a later turn of another
    branch would take them for its own."""
    world = World(scorer=Witness())
    path = [world.node(7, 0, 480, children=2), world.node(8, 480, 600)]
    view = world.open(1, 600, path, computed=window(584, 600))
    assert view.spans[0].observation is None
    assert view.spans[1].observation.positions == tuple(range(584, 600))


def test_a_fork_counts_both_of_its_builds():
    """Catches builds that appear under none of the three reasons."""
    world = World(scorer=Witness())
    path = [world.node(7, 0, 480, children=2), world.node(8, 480, 600)]
    world.open(1, 600, path, computed=window(584, 600))
    assert world.counters.built == 2
    assert counts(world) == (2, 0, 0)


def test_a_fold_that_selects_anew_is_counted():
    """Catches a fallback to KeyDiff that the counters do not show: a fold has no queries."""
    world = World(scorer=Witness(), keep_ratio=None, keep_tokens=1)
    view = world.open(1, 500, computed=window(484, 500))
    for end in (650, 750):
        world.commit(view, view.tail_start, end)
        assert world.views.fold([(view, end)])[0]
    assert (len(view.spans), world.counters.built) == (1, 2), "selected anew"
    assert counts(world) == (1, 0, 1)


def test_a_scorer_without_queries_counts_nothing():
    """Catches a scorer that needs no queries reported as falling back."""
    world = World()
    world.open(1, 500)
    assert (world.counters.built, counts(world)) == (1, (0, 0, 0))


def test_a_path_scorer_chooses_among_the_rest_only():
    """Catches scores of the whole path that are not cut to the part being built: the addition
    would hold tokens that the reused span stands for."""
    world = World(scorer=Witness())
    path = [world.node(7, 0, 500)]
    world.views.close(world.open(1, 500, path, computed=window(484, 500)))
    view = world.open(1, 600, [world.node(7, 0, 500)], computed=window(584, 600))
    first, second = (span.rows for span in view.spans)
    for layer, head, positions in each_head(world.tokens_of(view, 600)):
        assert positions[first:] == world.best(1, layer, head, 500, 600, second, 600)
