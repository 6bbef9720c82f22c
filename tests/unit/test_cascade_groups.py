"""Groups of requests that read a prefix together."""

from __future__ import annotations

import random
from itertools import combinations
from types import SimpleNamespace

import pytest

from sglang_vericache.tree.view_plan import PathNode
from sglang_vericache.verify.cascade import Cascade, ordered
from sglang_vericache.verify.cascade_groups import PrefixGroup, group_by_prefix

SYSTEM, TOOLS, OTHER = (1, 1000), (2, 5000), (3, 3000)


def leaf(place: int, end: int = 6000) -> tuple[int, int]:
    return 100 + place, end


@pytest.mark.parametrize(
    ("paths", "groups"),
    [
        pytest.param([], [], id="nobody"),
        pytest.param([[], []], [], id="nothing-in-the-tree"),
        pytest.param([[leaf(0)], [leaf(1)]], [], id="nothing-shared"),
        pytest.param([[SYSTEM, leaf(0)], [SYSTEM, leaf(1)]], [((0, 1), 1000)], id="a-prefix"),
        pytest.param([[SYSTEM], [SYSTEM]], [((0, 1), 1000)], id="the-same"),
        pytest.param([[SYSTEM], [SYSTEM, leaf(1)]], [((0, 1), 1000)], id="one-goes-on"),
        pytest.param(
            [[SYSTEM, TOOLS, leaf(0)], [SYSTEM, leaf(1)], [SYSTEM, TOOLS, leaf(2)]],
            [((0, 2), 5000)],
            id="fewer-share-more",
        ),
        pytest.param(
            [[SYSTEM, TOOLS], [SYSTEM, TOOLS], *([SYSTEM, leaf(i)] for i in range(8))],
            [(tuple(range(10)), 1000)],
            id="many-share-less",
        ),
        pytest.param(
            [[SYSTEM, TOOLS], [SYSTEM, OTHER], [SYSTEM, OTHER], [SYSTEM, TOOLS], [SYSTEM, leaf(4)]],
            [((0, 3), 5000), ((1, 2), 3000)],
            id="two-below-one",
        ),
        pytest.param([[SYSTEM, TOOLS], [(1, 900), leaf(1)]], [], id="a-node-that-was-split-since"),
    ],
)
def test_groups(paths, groups):
    assert group_by_prefix(paths) == [PrefixGroup(*group) for group in groups]


def random_paths(rng: random.Random) -> list[list[tuple[int, int]]]:
    """Of a random tree."""
    nodes = [(0, rng.randint(1, 50))]
    parents: dict[int, int | None] = {0: None}
    for node in range(1, rng.randint(2, 7)):
        parent = rng.choice([None, *range(node)])
        parents[node] = parent
        nodes.append((node, (nodes[parent][1] if parent is not None else 0) + rng.randint(1, 50)))
    paths = []
    for _ in range(rng.randint(1, 7)):
        node: int | None = rng.randrange(len(nodes))
        path = []
        while node is not None:
            path.append(nodes[node])
            node = parents[node]
        paths.append(path[::-1])
    return paths


@pytest.mark.parametrize("seed", range(200))
def test_nothing_saves_more(seed):
    """Against all choices of nodes none of which is below another."""
    paths = random_paths(random.Random(seed))
    found = group_by_prefix(paths)
    members = [place for group in found for place in group.members]
    assert len(members) == len(set(members))
    for group in found:
        assert len(group.members) > 1
        prefixes = [[n for n in paths[p] if n[1] <= group.tokens] for p in group.members]
        assert all(prefix == prefixes[0] for prefix in prefixes)
        assert prefixes[0][-1][1] == group.tokens
    nodes = sorted({node for path in paths for node in path})
    best = 0
    for count in range(len(nodes) + 1):
        for chosen in combinations(nodes, count):
            if any(len(set(path) & set(chosen)) > 1 for path in paths):
                continue
            best = max(best, sum((sum(n in p for p in paths) - 1) * n[1] for n in chosen))
    assert sum(group.saved_tokens for group in found) == best


def test_members_stand_beside_each_other():
    work = [(4, 7), (5, 3), (8, 7), (9, 1), (11, 2)]
    groups = [PrefixGroup((0, 3), 5000), PrefixGroup((2, 4), 3000)]
    assert ordered(work, groups) == (
        [(4, 7), (9, 1), (8, 7), (11, 2), (5, 3)],
        [(2, 5000), (2, 3000)],
    )
    assert ordered(work, []) == (work, [])


def test_what_a_batch_verifies_is_arranged(tree):
    """Catches places among those who verify that are taken for places in the batch."""
    tree.paths = {"b": [(1, 1000, 2)], "c": [(2, 9, 0)], "d": [(1, 1000, 2), (3, 2000, 0)]}
    running = states(*"abcd")
    cascade = Cascade(tree.path_of, 1, least_saved_bytes=1000)
    work = [(1, 7), (2, 3), (3, 5)]
    assert cascade.arrange(work, "abcd", running) == ([(1, 7), (3, 5), (2, 3)], [(2, 1000)])
    assert cascade.arrange([], "abcd", running) == ([], ())
    off = Cascade(tree.path_of, 1, enabled=False, least_saved_bytes=1000)
    assert off.arrange(work, "abcd", running) == (work, ())


class Tree:
    """Paths by request, counted as they are asked for."""

    def __init__(self) -> None:
        self.paths: dict[str, list[tuple[int, int, int]]] = {}
        self.asked: list[str] = []

    def path_of(self, req) -> list[PathNode]:
        self.asked.append(req)
        return [PathNode(node, 0, end, children) for node, end, children in self.paths[req]]


@pytest.fixture
def tree() -> Tree:
    return Tree()


def states(*names: str) -> list[SimpleNamespace]:
    return [State(name) for name in names]


class State(SimpleNamespace):
    def __init__(self, name: str) -> None:
        super().__init__(name=name)

    __hash__ = object.__hash__  # as RequestState, by identity


def test_paths_are_asked_for_once(tree):
    """Catches walks through the tree in every round."""
    tree.paths = {"a": [(1, 1000, 2), (2, 2000, 0)], "b": [(1, 1000, 2), (3, 2000, 0)]}
    cascade, running = Cascade(tree.path_of, 1, least_saved_bytes=1000), states("a", "b")
    for _ in range(3):
        assert cascade.groups(["a", "b"], running) == [PrefixGroup((0, 1), 1000)]
        cascade.count([(2, 1000)])
    cascade.count([])
    assert tree.asked == ["a", "b", "a", "b"]
    assert cascade.describe() == {"passes": 3, "saved_tokens": 3000}


def test_who_arrives_may_split_a_node(tree):
    """Catches a prefix that nobody finds, because the path of a running request is an old one."""
    cascade, (one, two) = Cascade(tree.path_of, 1, least_saved_bytes=1000), states("a", "b")
    tree.paths["a"] = [(1, 2000, 0)]
    assert cascade.groups(["a"], [one]) == []
    tree.paths = {"a": [(1, 1000, 2), (2, 2000, 0)], "b": [(1, 1000, 2), (3, 2000, 0)]}
    assert cascade.groups(["a", "b"], [one, two]) == [PrefixGroup((0, 1), 1000)]


def test_who_shares_nothing_asks_nobody_else(tree):
    tree.paths = {"a": [(1, 2000, 0)], "b": [(2, 2000, 0)], "c": [(3, 500, 1), (4, 2000, 0)]}
    cascade, (one, two, three) = (
        Cascade(tree.path_of, 1, least_saved_bytes=1000),
        states("a", "b", "c"),
    )
    assert cascade.groups(["a", "b"], [one, two]) == []
    assert cascade.groups(["a", "b", "c"], [one, two, three]) == []
    assert cascade.groups(["b", "c"], [two, three]) == []
    assert tree.asked == ["a", "b", "c"]


def test_little_is_not_worth_it(tree):
    """A pass with groups is not captured."""
    tree.paths = {"a": [(1, 1000, 2), (2, 2000, 0)], "b": [(1, 1000, 2), (3, 2000, 0)]}
    cascade = Cascade(tree.path_of, token_bytes=10, least_saved_bytes=10_001)
    assert cascade.groups(["a", "b"], states("a", "b")) == [PrefixGroup((0, 1), 1000)]
    cascade = Cascade(tree.path_of, token_bytes=10, least_saved_bytes=10_010)
    assert cascade.groups(["a", "b"], states("a", "b")) == []
