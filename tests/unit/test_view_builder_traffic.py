"""Many requests over one small draft pool: every slot has one holder, whatever the order."""

from __future__ import annotations

import random

import pytest
from view_fakes import World, each_head

from sglang_vericache.tree.view import DraftView

# A pool for little more than two requests, for three, and for all.
POOLS = pytest.mark.parametrize("slots", [260, 500, 1500])


class Traffic:
    """Four requests with a common prefix, each either waiting or running with a view.

    Attributes:
        running: row -> (view, committed tokens).
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.running: dict[int, tuple[DraftView, int]] = {}
        for row in (2, 3, 4):
            world.share(row, 1, 600)

    @property
    def views(self) -> list[DraftView]:
        return [view for view, _ in self.running.values()]

    def step(self) -> None:
        row = self.rng.randint(1, 4)
        if row in self.running:
            self.advance(row)
        else:
            self.start(row)

    def start(self, row: int) -> None:
        end = self.rng.choice([300, 450, 600])
        path = [self.world.node(300, 0, 300, children=2)]
        if end == 600:
            path.append(self.world.node(600, 300, 600))
        view = self.world.open(row, end, path)
        if view is not None:
            self.running[row] = (view, end)

    def advance(self, row: int) -> None:
        view, end = self.running[row]
        more = self.rng.randint(1, 40)
        if end + more > 1100 or self.rng.random() < 0.1:
            if self.rng.random() < 0.5:
                self.checkpoint(row, view)
            self.stop(row)
        elif view.tail_tokens(end) > 100:
            if not self.world.views.fold([(view, end)])[0]:
                self.stop(row)
        elif self.world.views.reserve(view, view.length(end + more)):
            self.world.commit(view, end, end + more)
            self.running[row] = (view, end + more)
        else:
            self.stop(row)

    def checkpoint(self, row: int, view: DraftView) -> None:
        """The tree gets a node where the tail starts: the prefix's own, or the request's."""
        end = view.tail_start
        node_id = end if end in (300, 600) else row * 10_000 + end
        self.world.views.adopt(view, [self.world.node(node_id, 0, end)])

    def stop(self, row: int) -> None:
        view, _ = self.running.pop(row)
        self.world.views.close(view)


@pytest.mark.parametrize("seed", range(4))
@POOLS
def test_every_slot_is_accounted_for(slots, seed):
    """Catches any order of opening, growing, folding, closing, checkpoints and evictions that
    loses a slot, frees one twice, or lets one view write over what another reads."""
    world = World(slots=slots, keep_ratio=0.1)
    traffic = Traffic(world, random.Random(seed))
    for _ in range(300):
        traffic.step()
        assert world.held(traffic.views) == world.used
        for view, end in traffic.running.values():
            for _, _, positions in each_head(world.tokens_of(view, end)):
                assert positions[view.span_rows :] == list(range(view.tail_start, end))
    for row in list(traffic.running):
        traffic.stop(row)
    assert world.held([]) == world.used == world.spans.rows
    world.spans.clear()
    assert world.used == 0


@POOLS
def test_traffic_is_worth_following(slots):
    """Catches a simulation in which nothing happens, so that the test above would hold idly."""
    world = World(slots=slots, keep_ratio=0.1)
    traffic = Traffic(world, random.Random(0))
    for _ in range(300):
        traffic.step()
    counters = world.counters
    assert counters.built and counters.reused and counters.folded
    assert bool(counters.evicted and counters.no_memory) == (slots < 1500)
