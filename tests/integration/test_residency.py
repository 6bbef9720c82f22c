"""Detaching and attaching on SGLang's own radix cache, with every byte checked."""

from __future__ import annotations

import random
import threading

import cpu_engine
import pytest

cpu_engine.required()

from sglang.srt.mem_cache.base_prefix_cache import EvictParams  # noqa: E402
from tree_world import World, away, back, settings, text  # noqa: E402, F401

from sglang_vericache.loader.copy import PlainCopier  # noqa: E402
from sglang_vericache.loader.planner import Place  # noqa: E402

CORES = ("rust", "python")


@pytest.fixture(params=CORES)
def world(request):
    made = World(device=400, host=2_000, core=request.param)
    yield made
    made.close()


def test_there_and_back(world):
    """Its nodes leave the device for others, and come back with the very bytes."""
    first = world.admit(text(1, 150))
    world.generate(first, 5)
    away(world, first)
    others = [world.admit(text(2 + n, 120)) for n in range(3)]
    assert all(others) and world.cache.tree_core.is_full_device_evicted(first.last_node)
    for other in others[:2]:
        away(world, other)
    back(world, first)
    assert world.loader.counters.fetches == 1 and world.loader.counters.tokens == 150
    world.generate(first, 5)
    for req in list(world.requests):
        world.end(req, checkpoint=True)
    world.check_idle()


def test_what_is_still_there_costs_no_copy(world):
    req = world.admit(text(1, 150))
    away(world, req)
    back(world, req)
    world.generate(req, 3)
    assert world.loader.counters.fetches == 0
    world.end(req, True)
    world.check_idle()


def test_no_room(world):
    """Nothing changes when the pool has no room for the path; later it comes all the same."""
    first, second = world.admit(text(1, 200)), world.admit(text(2, 150))
    away(world, first)
    third = world.admit(text(3, 240))
    assert third and not world.residency.order(world.residency.seat_of(first))
    world.check_ledger()
    world.end(third, False)
    away(world, second)
    back(world, first)
    world.generate(first, 3)
    for req in (first, second):
        world.end(req, True)
    world.check_idle()


def test_a_shared_prefix_is_fetched_once(world):
    prefix = text(9, 100)
    group = [world.admit(prefix + text(20 + n, 20)) for n in range(3)]
    for req in group:
        away(world, req)
    big = world.admit(text(99, 380))
    assert big, "everything of the group has left"
    world.end(big, False)
    for req in group:
        assert world.residency.order(world.residency.seat_of(req))
    while not all(world.residency.is_full(req) for req in group):
        world.arrive(0.05)
    assert world.loader.counters.tokens == 160
    for req in group:
        world.generate(req, 4)
        world.end(req, True)
    world.check_idle()


def test_long_outputs_leave_as_well(world):
    """What was generated goes to the tree, and comes back from the host."""
    req = world.admit(text(1, 50))
    for _ in range(12):
        assert world.generate(req, 10)
    assert req.kv.cache_protected_len == 50
    world.residency.push(world.residency.seat_of(req))
    world.events()
    assert req.kv.cache_protected_len == 170
    away(world, req)
    other = world.admit(text(2, 390))
    assert other
    world.end(other, False)
    back(world, req)
    world.generate(req, 5)
    world.end(req, True)
    world.check_idle()


def test_incomplete_copies_stay(world):
    """Catches a detach before the copy to the host has finished: the bytes would be lost."""
    req = world.admit(text(1, 80))
    node = req.last_node
    seat = world.residency.seat_of(req)
    world.cache.ongoing_write_through[node] = _Writing([node])
    assert not world.residency.is_complete(seat)
    del world.cache.ongoing_write_through[node]
    assert world.residency.is_complete(seat)
    away(world, req)
    with pytest.raises(AssertionError, match="is detached: cannot be detached"):
        world.residency.detach(seat, 0)
    back(world, req)
    with pytest.raises(AssertionError, match="is attached: cannot be fetched"):
        world.residency.order(seat)
    world.end(req, False)
    world.check_idle()


class _Writing:
    def __init__(self, nodes) -> None:
        self.publish_node_ids = nodes


class Gated(PlainCopier):
    """Copies nothing until told."""

    def __init__(self, *layers, **options) -> None:
        super().__init__(*layers, **options)
        self.gate = threading.Event()

    def submit(self, jobs) -> None:
        assert self.gate.wait(20)
        super().submit(jobs)


@pytest.fixture(params=CORES)
def gated(request):
    made = World(device=400, host=2_000, core=request.param, copier=Gated)
    yield made
    made.copier.gate.set()
    made.close()


def fetching(world, count: int, size: int = 60) -> list:
    """So many requests whose fetch is under way and does not arrive."""
    reqs = [world.admit(text(n, size)) for n in range(count)]
    for req in reqs:
        away(world, req)
    big = world.admit(text(777, 390))
    assert big
    world.end(big, False)
    for req in reqs:
        assert world.residency.order(world.residency.seat_of(req))
    world.arrive(0.05)
    assert not any(world.residency.is_full(req) for req in reqs)
    return reqs


@pytest.mark.parametrize("checkpoint", [True, False], ids=["finish", "retract"])
def test_ended_while_its_fetch_is_under_way(gated, checkpoint):
    """The one being copied arrives for nobody, the others are called off; nothing is left."""
    reqs = fetching(gated, 5)
    for req in reqs:
        gated.end(req, checkpoint)
        gated.check_ledger()
    assert (gated.loader.counters.cancelled > 0) is not checkpoint
    gated.copier.gate.set()
    again = gated.admit(text(3, 60))
    gated.generate(again, 3)
    gated.end(again, True)
    gated.check_idle()


def test_nobody_reads_early(gated):
    """A prompt that matches nodes whose bytes are under way waits for them: check_row sees."""
    (req,) = fetching(gated, 1, 100)
    timer = threading.Timer(0.2, gated.copier.gate.set)
    timer.start()
    other = gated.admit(text(0, 100) + text(5, 20))  # checks its row before it "computes"
    assert gated.cache.protected_size() >= 100
    gated.arrive()
    assert gated.residency.is_full(req)
    gated.generate(req, 3)
    gated.generate(other, 3)
    for ended in (req, other):
        gated.end(ended, True)
    gated.check_idle()


def test_a_split_under_way(gated):
    """Another prompt ends within the nodes that are being fetched, and splits them."""
    (req,) = fetching(gated, 1, 100)
    threading.Timer(0.2, gated.copier.gate.set).start()
    other = gated.admit(text(0, 100)[:40] + [51] * 30)
    gated.generate(other, 3)
    gated.arrive(0.1)
    gated.generate(req, 3)
    for ended in (req, other):
        gated.end(ended, True)
    gated.check_idle()


def test_flush_while_fetches_are_under_way(gated):
    """Nothing may be written into a pool that was reset."""
    reqs = fetching(gated, 3)
    for req in reqs:
        gated.end(req, False)
    gated.copier.gate.set()
    gated.cache.reset()
    gated.allocator.clear()
    for buffers in (gated.pool.k_buffer, gated.pool.v_buffer):
        for layer in buffers:
            layer.fill_(-7)
    gated.arrive(0.1)
    assert all((layer == -7).all() for layer in (*gated.pool.k_buffer, *gated.pool.v_buffer))
    req = gated.admit(text(1, 60))
    gated.generate(req, 3)
    gated.end(req, True)
    gated.check_idle()


@pytest.mark.parametrize("host", [2_000, 500], ids=["roomy host", "tight host"])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(s, marks=pytest.mark.long) for s in range(4, 40))]
)
def test_anything_goes(seed, core, host):
    """Thousands of random moves of a dozen requests that share prefixes; every read checks every
    byte, every step the ledger and the rows."""
    rng = random.Random(seed)
    world = World(device=180, host=host, core=core)
    moves = {"fetched": 0, "detached": 0}
    for step in range(600):
        world.step = step
        what = rng.choice("aaddddoooorrrrggggpef")
        req = rng.choice(world.requests) if world.requests else None
        seat = world.residency.seat_of(req) if req else None
        place = seat.place if seat else None
        if what == "a" and len(world.requests) < 12:
            shared = text(rng.randrange(3), rng.choice([0, 30, 60]))
            world.admit(shared + text(100 + rng.randrange(12), rng.randint(5, 90)))
        elif req is None:
            continue
        elif what == "d" and place is Place.ATTACHED and world.residency.is_complete(seat):
            away(world, req)
            moves["detached"] += 1
        elif what == "o" and place is Place.DETACHED:
            moves["fetched"] += world.residency.order(seat)
        elif what == "r":
            world.arrive(rng.choice([0, 0.002]))
        elif what == "g" and place is Place.ATTACHED:
            world.generate(req, rng.randint(1, 9))
        elif what == "p" and place is Place.ATTACHED:
            world.residency.push(seat)
        elif what in "ef":
            world.end(req, checkpoint=what == "f")
        if rng.random() < 0.5:
            world.events()
        world.check_ledger()
    for req in list(world.requests):
        world.end(req, rng.random() < 0.5)
        world.check_ledger()
    assert moves["detached"] and moves["fetched"]
    world.settle()
    last = world.admit(text(999, 120))
    away(world, last)
    world.cache.evict_for_alloc(EvictParams(num_tokens=world.allocator.size))
    back(world, last)
    world.generate(last, 3)
    world.end(last, True)
    assert world.loader.counters.fetches
    world.check_idle()
    world.close()
