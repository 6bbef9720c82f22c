"""Groups of a verification, on SGLang's own radix cache: whose rows begin with the same slots."""

from __future__ import annotations

from types import SimpleNamespace

import cpu_engine
import pytest

cpu_engine.required()

from tree_world import World, away, back, settings, text  # noqa: E402, F401

from sglang_vericache.verify.cascade import Cascade  # noqa: E402

CORES = ("rust", "python")
DOCUMENT = text(1, 90)


@pytest.fixture(params=CORES)
def world(request):
    made = World(device=600, host=2_000, core=request.param)
    yield made
    made.close()


class State(SimpleNamespace):
    __hash__ = object.__hash__


class Batch:
    """Requests that are verified together, in the order in which they came."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cascade = Cascade(world.cache.path_of, token_bytes=1, least_saved_bytes=1)
        self.reqs: list = []
        self.states: list[State] = []

    def join(self, tokens: list[int]):
        req = self.world.admit(tokens)
        assert req is not None
        self.reqs.append(req)
        self.states.append(State())
        return req

    def groups(self) -> list[tuple[tuple[int, ...], int]]:
        """Checked against the row table."""
        found = self.cascade.groups(self.reqs, self.states)
        table = self.world.rows.req_to_token
        for group in found:
            rows = [table[self.reqs[i].kv.req_pool_idx, : group.tokens] for i in group.members]
            assert all(row.equal(rows[0]) for row in rows)
        return [(group.members, group.tokens) for group in found]


def test_who_joins_shares_with_those_that_run(world):
    """Catches a node that was split when another request left it, and prompts that are the same."""
    batch = Batch(world)
    batch.join(DOCUMENT + text(2, 40))
    batch.join(text(3, 50))
    assert batch.groups() == []
    batch.join(DOCUMENT + text(4, 30))
    assert batch.groups() == [((0, 2), 90)]
    batch.join(DOCUMENT + text(4, 30))
    assert batch.groups() == [((0, 2, 3), 90)]
    for req in batch.reqs:
        world.generate(req, 3)
    assert batch.groups() == [((0, 2, 3), 90)]
    for req in list(world.requests):
        world.end(req, checkpoint=True)
    world.check_idle()


def test_who_was_away_shares_again(world):
    """Catches slots of a prefix that a request came back to other than those of its node."""
    batch = Batch(world)
    one, two = batch.join(DOCUMENT + text(2, 40)), batch.join(DOCUMENT + text(3, 40))
    assert batch.groups() == [((0, 1), 90)]
    away(world, one)
    away(world, two)
    filler = [world.admit(text(10 + n, 140)) for n in range(4)]
    assert all(filler)
    for req in filler:
        world.end(req, checkpoint=False)
    back(world, two)
    back(world, one)
    assert batch.groups() == [((0, 1), 90)]
    for req in list(world.requests):
        world.end(req, checkpoint=True)
    world.check_idle()
