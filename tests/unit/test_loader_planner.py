"""Who stays attached, who rotates, and whether everybody gets there."""

from __future__ import annotations

import random

import pytest
from rotation_world import Simulated, World, requests

from sglang_vericache.loader.planner import (
    Memory,
    PathPart,
    Place,
    Runner,
    is_sound,
    keeps_paths_together,
    plan_moves,
)


def runner(number, tokens, place=Place.ATTACHED, since=0, movable=True, shared=(), bound=False):
    path = (*(PathPart(n, t) for n, t in shared), PathPart(number, tokens))
    return Runner(f"r{number}", number, path, place, since, movable, bound)


def test_what_fits_stays():
    """Catches rotation where keeping everything attached is possible."""
    runners = [runner(n, 100) for n in range(5)]
    moves = plan_moves(runners, Memory(free=50, slack=50))
    assert (moves.detach, moves.fetch, moves.rotating) == ((), (), frozenset())


def test_room_for_the_waiting_queue():
    """Catches a waiting request for which nobody makes room, and older requests that leave."""
    runners = [runner(n, 100) for n in range(5)]
    moves = plan_moves(runners, Memory(free=60, slack=50, wanted=100))
    assert moves.wanted == 100
    assert moves.detach and "r0" not in moves.detach
    assert set(moves.detach) == moves.rotating


def test_hopeless_wishes_are_dropped():
    """Catches a queue that waits for room which bound requests never give."""
    runners = [runner(n, 100, bound=True, movable=False) for n in range(5)]
    moves = plan_moves(runners, Memory(free=60, slack=50, wanted=100))
    assert (moves.wanted, moves.detach) == (0, ())


def test_tails_that_grew_push_somebody_out():
    runners = [runner(n, 100) for n in range(5)]
    assert plan_moves(runners, Memory(free=10, slack=50)).detach
    assert not plan_moves(runners, Memory(free=10, slack=50), may_rotate=False).detach


def test_oldest_first_and_no_overtaking():
    """Catches the starvation that batch order brings: small requests would win every step."""
    attached = runner(0, 300, movable=False)
    waiting = [
        runner(1, 500, Place.DETACHED, since=3),
        runner(2, 50, Place.DETACHED, since=5),
        runner(3, 20, Place.DETACHED, since=4),
    ]
    assert plan_moves([attached, *waiting], Memory(free=200, slack=0)).fetch == ()
    assert plan_moves([attached, *waiting], Memory(free=530, slack=0)).fetch == ("r1", "r3")
    assert plan_moves([attached, *waiting], Memory(free=570, slack=0)).fetch == ("r1", "r3", "r2")


def test_a_shared_node_is_counted_once():
    """Catches a group that is fetched one by one although its prefix is there."""
    group = [
        runner(n, 10, Place.DETACHED, since=n, movable=False, shared=((99, 400),)) for n in range(4)
    ]
    assert plan_moves(group, Memory(free=440, slack=0)).fetch == ("r0", "r1", "r2", "r3")
    assert plan_moves(group, Memory(free=420, slack=0)).fetch == ("r0", "r1")


def test_who_needs_nothing_may_pass():
    """Everything on its path is locked by others: waiting would help nobody."""
    there = runner(0, 10, movable=False, shared=((99, 400),))
    blocked = runner(1, 500, Place.DETACHED, since=1)
    same = Runner("same", 2, (PathPart(99, 400),), Place.DETACHED, since=2)
    assert plan_moves([there, blocked, same], Memory(free=100, slack=0)).fetch == ("same",)


def test_rotating_requests_leave_after_their_verify():
    """Catches a staging share that its first users never give back."""
    runners = [runner(n, 100) for n in range(2)]
    runners += [runner(2, 100), runner(3, 100, movable=False)]
    runners += [runner(n, 100, Place.DETACHED, since=n) for n in range(4, 8)]
    moves = plan_moves(runners, Memory(free=10, slack=10))
    assert moves.rotating == {f"r{n}" for n in range(2, 8)}
    assert moves.detach == ("r2",)  # r3 has not been verified yet
    assert moves.fetch == ("r4",)


def test_soundness():
    assert is_sound([], 0) and is_sound([5, 10], 10)
    assert not is_sound([5, 11], 10)


@pytest.mark.parametrize("seed", range(200))
def test_moves_keep_to_the_pool(seed):
    """Property: nobody bound, unverified or already detached moves; what is locked afterwards
    fits; the queue is served in order; nothing waits while it fits."""
    rng = random.Random(seed)
    runners, locked = [], {}
    for n in range(rng.randint(1, 40)):
        place = rng.choice(list(Place))
        bound = place is Place.ATTACHED and rng.random() < 0.2
        shared = ((900 + rng.randrange(4), 70),) if rng.random() < 0.4 else ()
        found = runner(
            n, rng.randint(1, 200), place, rng.randrange(9), rng.random() < 0.7, shared, bound
        )
        runners.append(found)
        if place is not Place.DETACHED:
            locked |= {part.node_id: part.tokens for part in found.path}
    memory = Memory(rng.randrange(2000), rng.randrange(100), rng.choice([0, 0, rng.randrange(900)]))
    moves = plan_moves(runners, memory)
    by_rid = {r.rid: r for r in runners}
    for rid in moves.detach:
        r = by_rid[rid]
        assert r.place is Place.ATTACHED and r.movable and not r.bound and rid in moves.rotating
    assert all(by_rid[rid].place is Place.DETACHED for rid in moves.fetch)
    kept = {}
    for r in runners:
        if r.rid in moves.fetch or (r.place is not Place.DETACHED and r.rid not in moves.detach):
            kept |= {part.node_id: part.tokens for part in r.path}
    grown = sum(kept.values()) - sum(locked.values())
    if any(not set(p.node_id for p in by_rid[rid].path) <= locked.keys() for rid in moves.fetch):
        assert grown + memory.slack + moves.wanted <= memory.free
    turns = [(by_rid[rid].since, by_rid[rid].order) for rid in moves.fetch]
    assert turns == sorted(turns)


CASES = {
    "half": dict(capacity=8_000, link=400, shared=0.0, bound=0.0),
    "eighth": dict(capacity=2_600, link=150, shared=0.0, bound=0.0),
    "shared": dict(capacity=4_000, link=200, shared=0.7, bound=0.0),
    "some are bound": dict(capacity=6_000, link=300, shared=0.3, bound=0.2),
    "slow link": dict(capacity=3_000, link=20, shared=0.3, bound=0.05),
}


@pytest.mark.parametrize("count", [300, pytest.param(2_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", CASES)
def test_everybody_gets_there(name, count):
    """Catches deadlock and starvation; the world checks the pool, the order and the KV itself."""
    case = CASES[name]
    world = World(case["capacity"], case["link"])
    for request in requests(7, count, 200, 2_000, 20, case["shared"], case["bound"]):
        world.submit(request)
    world.run(2_000 * count)
    assert len(world.finished) == count
    assert world.fetched > 0, "nobody rotated"


def test_waits_are_fair():
    """Catches long requests that are verified far less often than short ones: with one size
    eight times the other, both wait about as long for their turn."""
    world = World(capacity=3_000, link=300)
    for n in range(24):
        tokens = 1_600 if n % 2 else 200
        world.submit(Simulated(f"r{n}", n, (PathPart(n, tokens),), rounds=60))
    world.run(100_000)
    waits = {
        size: [w for r in world.finished if r.tokens == size for w in r.waits]
        for size in (200, 1_600)
    }
    mean = {size: sum(w) / len(w) for size, w in waits.items() if w}
    assert len(mean) == 2, "one size never rotated"
    assert mean[1_600] < 2.5 * mean[200] + 10, mean


def test_more_run_together():
    """Catches a rotation that gains nothing: the same pool without it runs fewer at a time."""

    def most_together(may_rotate: bool) -> int:
        world = World(capacity=4_000, link=400)
        for n in range(16):
            world.submit(
                Simulated(f"r{n}", n, (PathPart(n, 900),), rounds=30, bound=not may_rotate)
            )
        most = 0
        while world.waiting or world.running:
            world.step()
            most = max(most, len(world.running))
            assert world.step_number < 10_000
        return most

    assert most_together(False) == 4
    assert most_together(True) >= 12


def test_two_paths_side_by_side_by_hand():
    """A newcomer's output must not take the room of a second path, where there is one."""
    assert keeps_paths_together([100, 80], 230, 30)
    assert not keeps_paths_together([100, 80], 229, 30)
    assert keeps_paths_together([100, 80], 150, 50), "only one fits anyway"
    assert not keeps_paths_together([100, 80], 150, 51)
