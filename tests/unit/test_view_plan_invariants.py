"""plan_view over random trees that live: requests come, spans are built and evicted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.tree.view_plan import PathNode, SpanInfo, ViewPlan, plan_view

SINKS, RECENT = 4, 64
LIVES = 8
SCOPES = ["node", "path"]
BUDGETS = [
    pytest.param(Budget(0.01, None), id="ratio-0.01"),
    pytest.param(Budget(0.2, None), id="ratio-0.2"),
    pytest.param(Budget(1.0, None), id="ratio-1"),
    pytest.param(Budget(None, 20), id="tokens-20"),
    pytest.param(Budget(None, 1500), id="tokens-1500"),
    pytest.param(Budget(0.2, None, least_rows=1024), id="floor-1024"),
]


@dataclass
class Node:
    """A node of the simulated radix tree."""

    number: int
    parent: Node | None
    end: int
    span: SpanInfo | None = None
    children: list[Node] = field(default_factory=list)

    def path(self) -> list[PathNode]:
        above = self.parent.path() if self.parent else []
        start = self.parent.end if self.parent else 0
        return [*above, PathNode(self.number, start, self.end, len(self.children), self.span)]


def lives(budget: Budget, scope: str) -> Iterator[tuple[int, ViewPlan]]:
    """(end, plan) of every request of some random trees."""
    for seed in range(LIVES):
        yield from life(random.Random(seed), budget, scope)


def life(rng: random.Random, budget: Budget, scope: str) -> Iterator[tuple[int, ViewPlan]]:
    """150 requests to one tree: new prompts, next turns, branches, repeats, odd endings."""
    nodes: list[Node] = []
    for _ in range(150):
        parent = rng.choice(nodes) if nodes and rng.random() < 0.85 else None
        if parent is not None and rng.random() < 0.3:
            leaf = parent  # the same prompt again
        else:
            length = rng.choice([rng.randint(1, 80), rng.randint(80, 600), rng.randint(600, 5000)])
            leaf = Node(len(nodes), parent, (parent.end if parent else 0) + length)
            nodes.append(leaf)
            if parent is not None:
                parent.children.append(leaf)
        end = leaf.end + rng.choice([0, 0, 0, 1, rng.randint(1, 300)])
        plan = plan_view(leaf.path(), end, budget, scope)
        yield end, plan
        for build in plan.builds:
            if build.node_id is not None and nodes[build.node_id].span is None:
                nodes[build.node_id].span = SpanInfo(build.start, build.rows, scope, budget)
        for node in nodes:
            if node.span is not None and rng.random() < 0.05:
                node.span = None  # evicted


def over_lives(test):
    return pytest.mark.parametrize("scope", SCOPES)(
        pytest.mark.parametrize("budget", BUDGETS)(test)
    )


@over_lives
def test_spans_tile_the_path(budget, scope):
    """Catches tokens that no span covers or two do: a draft view would miss or repeat them."""
    for end, plan in lives(budget, scope):
        bounds = [(node.span.start, node.end) for node in plan.reused]
        bounds += [(build.start, build.end) for build in plan.builds]
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
        assert bounds[-1][1] == end


@over_lives
def test_rows_stay_within_the_limit(budget, scope):
    """Catches views wider than the row they are written to, and a budget that is not kept."""
    for end, plan in lives(budget, scope):
        rows = sum(node.span.rows for node in plan.reused)
        rows += sum(build.rows for build in plan.builds)
        assert rows <= budget.limit_rows(end)


@over_lives
def test_builds_can_be_selected(budget, scope):
    """Catches more rows than tokens, which selection refuses, and a span without rows."""
    for _, plan in lives(budget, scope):
        for build in plan.builds:
            assert 1 <= build.rows <= build.end - build.start


@over_lives
def test_builds_hold_what_is_always_kept(budget, scope):
    """Catches a span with fewer rows than sinks and recent tokens: which of them it drops is
    then chance, and losing a sink ruins the draft."""
    for end, plan in lives(budget, scope):
        for build in plan.builds:
            positions = range(build.start, build.end)
            assert build.rows >= sum(p < SINKS or p >= end - RECENT for p in positions)


@over_lives
def test_lives_are_worth_simulating(budget, scope):
    """Catches a simulation that never gets to the interesting plans, so that the tests above
    would hold for nothing."""
    plans = [plan for _, plan in lives(budget, scope)]
    assert any(plan.reused and not plan.builds for plan in plans), "no exact match"
    assert any(len(plan.builds) == 2 for plan in plans), "no fork"
    assert any(plan.builds and not plan.reused for plan in plans), "nothing built anew"
