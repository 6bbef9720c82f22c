"""Host memory that is overwritten between a copy and the fetch of it: nobody ever reads it."""

from __future__ import annotations

import random
import threading

import cpu_engine
import pytest

cpu_engine.required()

from sglang.srt.mem_cache.base_prefix_cache import EvictParams  # noqa: E402
from test_residency import Gated  # noqa: E402
from test_rotation import Scheduler, texts  # noqa: E402
from tree_world import World, away, back, settings, text  # noqa: E402, F401

from sglang_vericache.loader.planner import Place  # noqa: E402

CORES = ("rust", "python")


@pytest.fixture(params=CORES)
def world(request):
    made = World(device=400, host=2_000, core=request.param, checks=True)
    yield made
    made.close()


def empty_device(world) -> None:
    """Everything that is not locked leaves."""
    world.cache.evict_for_alloc(EvictParams(num_tokens=world.allocator.size))


def numbers(world) -> tuple[int, int, int]:
    counters = world.loader.counters
    return counters.corrupt, counters.corrupt_tokens, world.residency.integrity.recomputed


def test_what_is_whole_is_believed(world):
    """Catches checksums that do not follow what is written: splits, other slots, pushed output."""
    first = world.admit(text(1, 100))
    other = world.admit(text(1, 100)[:40] + text(2, 50))
    for _ in range(8):
        world.generate(first, 9)
    world.residency.push(world.residency.seat_of(first))
    world.events()
    for _ in range(2):
        for req in (first, other):
            away(world, req)
        empty_device(world)
        for req in (other, first):
            back(world, req)
            world.generate(req, 2)
    assert world.loader.counters.fetches >= 4 and numbers(world) == (0, 0, 0)
    for req in (first, other):
        world.end(req, True)
    world.check_idle()


def test_a_running_request(world, caplog):
    """One bit of one token: everything from the first to the last changed token is computed again,
    and the host has it again as it was."""
    req = world.admit(text(1, 150))
    rows = world.host_rows(req.last_node)
    away(world, req)
    empty_device(world)
    world.corrupt(int(rows[70]))
    world.corrupt(int(rows[79]), layer=3)
    back(world, req)
    world.generate(req, 5)  # checks every byte
    assert numbers(world) == (1, 2, 10)
    assert caplog.text.count("The host copy of 2 tokens is not what was written there") == 1
    away(world, req)
    empty_device(world)
    back(world, req)
    world.generate(req, 5)
    assert numbers(world) == (1, 2, 10), "the host copy was not written anew"
    world.end(req, True)
    world.check_idle()


def test_a_new_prompt_finds_it(world):
    """What SGLang itself loads for a prompt is checked as well."""
    world.rng.random = lambda: 0.0  # no prefill is put off
    first = world.admit(text(1, 150))
    rows = world.host_rows(first.last_node)
    world.end(first, True)
    empty_device(world)
    world.corrupt(int(rows[149]))
    world.corrupt(int(rows[0]))
    again = world.admit(text(1, 150) + text(2, 30))
    world.generate(again, 3)
    assert numbers(world) == (1, 2, 150)
    world.end(again, True)
    world.check_idle()


def test_a_prefill_that_was_put_off(world):
    """Its load arrives changed for nobody, leaves the device again, and is found out once more by
    the next one."""
    first = world.admit(text(1, 150))
    rows = world.host_rows(first.last_node)
    world.end(first, True)
    empty_device(world)
    world.corrupt(int(rows[20]))
    world.rng.random = lambda: 1.0
    assert world.admit(text(1, 150) + text(2, 30)) is None
    other = world.admit(text(3, 50))  # a prefill that does not read it has it loaded
    world.arrive()
    assert numbers(world) == (1, 1, 0)
    world.check_ledger()
    assert world.cache.tree_core.is_full_device_evicted(first.last_node)
    world.rng.random = lambda: 0.0
    again = world.admit(text(1, 150) + text(2, 30))
    assert numbers(world) == (2, 2, 1)
    for req in (other, again):
        world.end(req, True)
    world.check_idle()


def test_requests_that_share_it(world):
    """The first to arrive mends what is on its own path, another one the rest."""
    prefix = text(9, 100)
    short, long = world.admit(prefix + text(1, 10)), world.admit(prefix + text(2, 60))
    shared = world.host_rows(world.residency.seat_of(long).path[0].node_id)
    own = world.host_rows(long.last_node)
    for req in (short, long):
        away(world, req)
    empty_device(world)
    world.corrupt(int(shared[50]))
    world.corrupt(int(own[10]))
    for req in (long, short):
        assert world.residency.order(world.residency.seat_of(req))
    while not all(world.residency.is_full(req) for req in (long, short)):
        world.arrive(0.05)
    for req in (short, long):
        world.generate(req, 4)
    corrupt, tokens, recomputed = numbers(world)
    assert (corrupt, tokens) == (1, 2) and 2 <= recomputed <= 61
    for req in (short, long):
        world.end(req, True)
    world.check_idle()


@pytest.mark.parametrize("checkpoint", [True, False], ids=["finish", "retract"])
@pytest.mark.parametrize("core", CORES)
def test_its_request_ends_meanwhile(core, checkpoint):
    """Nothing is inserted below what is not right, and nothing is left on either tier."""
    world = World(device=400, host=2_000, core=core, copier=Gated, checks=True)
    req = world.admit(text(1, 150))
    world.generate(req, 20)
    rows = world.host_rows(req.last_node)
    away(world, req)
    empty_device(world)
    world.corrupt(int(rows[5]))
    assert world.residency.order(world.residency.seat_of(req))
    threading.Timer(0.1, world.copier.gate.set).start()
    world.arrive(0.02)
    assert world.residency.seat_of(req).place is Place.FETCHING
    world.end(req, checkpoint)
    world.settle()
    world.arrive()
    assert world.cache.evictable_size() == 0, "what came back changed is still on the device"
    world.rng.random = lambda: 0.0
    again = world.admit(text(1, 150) + text(2, 3))
    world.generate(again, 3)
    assert world.residency.integrity.recomputed == 1
    world.end(again, True)
    world.check_idle()
    world.close()


def test_flush(world):
    """What is known of copies that are gone does not meet new ones in their place."""
    req = world.admit(text(1, 150))
    rows = world.host_rows(req.last_node)
    away(world, req)
    empty_device(world)
    world.corrupt(int(rows[5]))
    assert world.residency.order(world.residency.seat_of(req))
    world.end(req, False)
    world.cache.reset()
    world.allocator.clear()
    req = world.admit(text(2, 150))
    away(world, req)
    empty_device(world)
    before = world.loader.counters.corrupt
    back(world, req)
    world.generate(req, 3)
    assert world.loader.counters.corrupt == before
    world.end(req, True)
    world.check_idle()


def corrupt_anything(world, rng: random.Random) -> None:
    for _ in range(4):
        row = rng.randrange(len(world.host_layers[0]))
        world.corrupt(row, rng.randrange(len(world.host_layers)), rng.randrange(8))


@pytest.mark.parametrize("host", [2_000, 500], ids=["roomy host", "tight host"])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(s, marks=pytest.mark.long) for s in range(3, 20))]
)
def test_anything_goes(seed, core, host):
    """Random moves of a dozen requests that share prefixes while bits of the host flip; every read
    checks every byte."""
    rng = random.Random(seed)
    world = World(device=180, host=host, core=core, checks=True)
    for step in range(500):
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
        elif what == "o" and place is Place.DETACHED:
            world.residency.order(seat)
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
        if rng.random() < 0.3:
            corrupt_anything(world, rng)
        world.check_ledger()
    for req in list(world.requests):
        world.end(req, rng.random() < 0.5)
        world.check_ledger()
    world.settle()
    assert world.loader.counters.corrupt and world.residency.integrity.recomputed
    world.check_idle()
    world.close()


def test_a_rotation():
    """Forty requests through a pool for three get there over a host that cannot be trusted."""
    world = World(device=450, host=6_000, checks=True)
    scheduler = Scheduler(world)
    scheduler.waiting = [(t, 40) for t in texts(5, 40, 40, 140, 0.5)]
    rng = random.Random(1)
    scheduler.run(50_000, lambda step: corrupt_anything(world, rng))
    found = scheduler.rotation.numbers()
    assert found.detachments > 0 and found.corrupt > 0
    assert found.recomputed_tokens >= found.corrupt
    assert len(scheduler.done) == 40
    world.check_idle()
    world.close()
