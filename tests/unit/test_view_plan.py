"""plan_view, case by case: what is reused, what is built, and who owns it."""

from __future__ import annotations

import pytest

from sglang_vericache.compressors.base import Scope
from sglang_vericache.compressors.budget import Budget
from sglang_vericache.tree.view_plan import Build, PathNode, SpanInfo, plan_view

FIFTH = Budget(0.2, None)


def node(
    node_id: int,
    start: int,
    end: int,
    span=None,
    children: int = 1,
    scope: Scope = "path",
    span_budget: Budget = FIFTH,
) -> PathNode:
    """``span`` is (start, rows) of a span that ends where the node ends."""
    info = SpanInfo(span[0], span[1], scope, span_budget) if span else None
    return PathNode(node_id, start, end, children, info)


def plan(path, end: int, budget: Budget = FIFTH, scope="path") -> tuple[list[int], list[Build]]:
    """Ids of the reused nodes and the builds."""
    result = plan_view(path, end, budget, scope)
    return [node.node_id for node in result.reused], list(result.builds)


@pytest.mark.parametrize(
    ("path", "end", "reused", "builds"),
    [
        pytest.param([], 1000, [], [Build(0, 1000, 200, None)], id="no-tree"),
        pytest.param([node(1, 0, 1000)], 1000, [], [Build(0, 1000, 200, 1)], id="no-span"),
        pytest.param(
            [node(1, 0, 900)], 1000, [], [Build(0, 1000, 200, None)], id="path-shorter-than-end"
        ),
        pytest.param([node(1, 0, 1000, (0, 200))], 1000, [1], [], id="exact"),
        pytest.param(
            [node(1, 0, 1000, (0, 200)), node(2, 1000, 1200)],
            1200,
            [1],
            [Build(1000, 1200, 64, 2)],
            id="next-turn",
        ),
        pytest.param(
            [node(1, 0, 1000, (0, 200))],
            1200,
            [1],
            [Build(1000, 1200, 64, None)],
            id="next-turn-not-in-the-tree",
        ),
        pytest.param(
            [node(1, 0, 4000, (0, 800)), node(2, 4000, 5000)],
            5000,
            [1],
            [Build(4000, 5000, 200, 2)],
            id="long-turn-gets-its-share",
        ),
        pytest.param(
            [node(1, 0, 1000, (0, 200))], 1010, [1], [Build(1000, 1010, 10, None)], id="few-tokens"
        ),
        pytest.param(
            [node(1, 0, 1000, (0, 245)), node(2, 1000, 1200)],
            1200,
            [],
            [Build(0, 1200, 240, 2)],
            id="beyond-the-limit",
        ),
        pytest.param(
            [node(1, 0, 1000, (0, 244)), node(2, 1000, 1200)],
            1200,
            [1],
            [Build(1000, 1200, 64, 2)],
            id="just-within-the-limit",
        ),
        pytest.param(
            [node(1, 0, 500, (0, 100)), node(2, 500, 1000, (500, 100)), node(3, 1000, 1100)],
            1100,
            [1, 2],
            [Build(1000, 1100, 64, 3)],
            id="chain",
        ),
        pytest.param(
            [node(1, 0, 500, (0, 100)), node(2, 500, 1000, (0, 200)), node(3, 1000, 1100)],
            1100,
            [2],
            [Build(1000, 1100, 64, 3)],
            id="span-over-its-ancestors",
        ),
        pytest.param(
            [node(1, 0, 300), node(2, 300, 700, (0, 90)), node(3, 700, 1000, (700, 90))],
            1000,
            [2, 3],
            [],
            id="chain-skips-a-node-without-span",
        ),
        pytest.param(
            [node(1, 0, 900, (0, 180)), node(2, 900, 1000, (800, 70))],
            1000,
            [1],
            [Build(900, 1000, 64, 2)],
            id="gap-falls-back-to-the-shallower",
        ),
        pytest.param(
            [node(1, 0, 500), node(2, 500, 1000, (500, 100))],
            1000,
            [],
            [Build(0, 1000, 200, 2)],
            id="gap-at-the-root",
        ),
        pytest.param(
            [node(1, 0, 900, (0, 180)), node(2, 900, 1100, (0, 220))],
            1000,
            [1],
            [Build(900, 1000, 64, None)],
            id="span-past-the-end-is-no-use",
        ),
        pytest.param(
            [node(1, 0, 900, (0, 180)), node(2, 900, 960, (0, 192))],
            1000,
            [2],
            [Build(960, 1000, 40, None)],
            id="deepest-first",
        ),
    ],
)
def test_table(path, end, reused, builds):
    """Catches builds beside a span that fits, spans taken over a gap, additions without the
    recent tokens, and a build that is given to a node which ends elsewhere."""
    assert plan(path, end) == (reused, builds)


@pytest.mark.parametrize(
    ("scope", "covered", "end", "reuses"),
    [
        ("path", 900, 1200, True),
        ("path", 900, 1201, False),
        ("node", 600, 1200, True),
        ("node", 600, 1201, False),
    ],
)
def test_how_much_a_span_must_cover(scope, covered, end, reuses):
    """Catches the two shares exchanged: what depends on the last queries ages faster."""
    reused, builds = plan([node(1, 0, covered, (0, 100), scope=scope)], end)
    assert reused == ([1] if reuses else [])
    assert builds[0].start == (covered if reuses else 0)


@pytest.mark.parametrize(
    ("end", "rows"), [(300, 300), (301, 300), (5000, 300)], ids=["all", "one-less", "long"]
)
def test_token_budget(end, rows):
    """Catches a budget in tokens that grows with the path."""
    assert plan([], end, Budget(None, 300)) == ([], [Build(0, end, rows, None)])


def test_token_budget_of_a_next_turn():
    """Catches an addition that takes the whole budget again: 300 * 200 / 1200 of it."""
    budget = Budget(None, 300)
    path = [node(1, 0, 1000, (0, 300), span_budget=budget), node(2, 1000, 1200)]
    assert plan(path, 1200, budget) == ([1], [Build(1000, 1200, 64, 2)])


def fork_path(fork: int, end: int) -> list[PathNode]:
    return [node(1, 0, fork, children=2), node(2, fork, end)]


@pytest.mark.parametrize(
    ("path", "end", "builds"),
    [
        pytest.param(
            fork_path(900, 1000),
            1000,
            [Build(0, 900, 180, 1), Build(900, 1000, 64, 2)],
            id="shared-prefix",
        ),
        pytest.param(
            fork_path(4000, 5000)[:1],
            5000,
            [Build(0, 4000, 800, 1), Build(4000, 5000, 200, None)],
            id="rest-not-in-the-tree",
        ),
        pytest.param(fork_path(749, 1000), 1000, [Build(0, 1000, 200, 2)], id="shared-too-little"),
        pytest.param(
            fork_path(750, 1000),
            1000,
            [Build(0, 750, 150, 1), Build(750, 1000, 64, 2)],
            id="shared-just-enough",
        ),
        pytest.param(
            [node(1, 0, 1000, children=3)], 1000, [Build(0, 1000, 200, 1)], id="fork-at-the-end"
        ),
        pytest.param(
            [node(1, 0, 1200, children=2)], 1000, [Build(0, 1000, 200, None)], id="fork-past-end"
        ),
        pytest.param(
            [node(1, 0, 800, children=2), node(2, 800, 900, children=2), node(3, 900, 1000)],
            1000,
            [Build(0, 900, 180, 2), Build(900, 1000, 64, 3)],
            id="deepest-fork",
        ),
    ],
)
def test_fork_builds_twice(path, end, builds):
    """Catches one private span where others could reuse a prefix, and a split that serves too
    small a prefix."""
    assert plan(path, end) == ([], builds)


def test_the_other_branch_reuses_the_shared_part():
    """Catches a first build that the next request through the fork cannot use."""
    _, builds = plan(fork_path(900, 1000), 1000)
    shared = builds[0]
    path = [node(1, 0, 900, (shared.start, shared.rows), children=2), node(5, 900, 1010)]
    assert plan(path, 1010) == ([1], [Build(900, 1010, 64, 5)])


def test_token_budget_is_one_for_both_parts_of_a_fork():
    """Catches a shared part that takes the whole budget and leaves the rest to come on top: the
    draft row is as wide as the limit, and writing beyond it stops the server."""
    budget = Budget(None, 1000)
    _, builds = plan(fork_path(6000, 8000), 8000, budget)
    assert sum(build.rows for build in builds) <= budget.limit_rows(8000) == 1068


def test_shared_part_holds_its_recent_tokens():
    """Catches a shared part so near the end that its sinks compete with recent tokens for too few
    rows: 4 sinks and positions 136 to 189 are kept before anything is scored."""
    _, builds = plan(fork_path(190, 200), 200, Budget(0.1, None))
    assert builds[0].rows >= 4 + (190 - 136)


def test_exact_match_stays_within_the_limit():
    """Catches a chain whose parts were selected at different times, the first one anew after an
    eviction: 68 + 64 rows, where 13 + 68 are allowed."""
    budget = Budget(0.01, None)
    path = [
        node(1, 0, 1000, (0, 68), span_budget=budget),
        node(2, 1000, 1300, (1000, 64), span_budget=budget),
    ]
    reused, builds = plan(path, 1300, budget)
    rows = sum(n.span.rows for n in path if n.node_id in reused) + sum(b.rows for b in builds)
    assert rows <= budget.limit_rows(1300) == 81


@pytest.mark.parametrize(
    ("asked", "kept", "reused"),
    [
        (0.2, Budget(0.2, None), True),
        (0.1, Budget(0.2, None), True),
        (0.3, Budget(0.2, None), False),
        (0.2, Budget(None, 240), True),
        (0.2, Budget(None, 239), False),
        (1.0, Budget(0.5, None), False),
        (1.0, Budget(1.0, None, most_rows=500), False),
    ],
)
def test_a_span_of_another_budget(asked, kept, reused):
    """Catches a request that drafts over less than it asked for. 1200 tokens: 0.2 keeps 240."""
    path = [node(1, 0, 1000, (0, 200), span_budget=kept), node(2, 1000, 1200)]
    ids, _ = plan(path, 1200, Budget(asked, None))
    assert ids == ([1] if reused else [])


def test_what_follows_a_generous_span_is_as_generous():
    """Catches a modest request that refuses a span because it holds more than it asked for, and
    one that then adds a stingy part to it, or exceeds the generous limit."""
    generous = Budget(0.5, None)
    path = [node(1, 0, 1000, (0, 500), span_budget=generous), node(2, 1000, 1200)]
    result = plan_view(path, 1200, Budget(0.1, None), "path")
    assert [n.node_id for n in result.reused] == [1]
    assert result.builds == (Build(1000, 1200, 100, 2),)
    assert result.budget == generous


def test_every_span_of_a_chain_must_keep_enough():
    """Catches a check that looks at the deepest span only."""
    path = [
        node(1, 0, 800, (0, 80), span_budget=Budget(0.1, None)),
        node(2, 800, 1000, (800, 100), span_budget=Budget(0.5, None)),
    ]
    assert plan(path, 1000, Budget(0.4, None)) == ([], [Build(0, 1000, 400, 2)])
