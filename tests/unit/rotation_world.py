"""A pool, a link and running requests in discrete time, to try the planner on.

Time is counted in scheduler steps. Nothing of SGLang; the pool is checked at every change.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from sglang_vericache.loader.planner import (
    Memory,
    PathPart,
    Place,
    Runner,
    is_sound,
    plan_moves,
)


@dataclass
class Simulated:
    """A request: a path (some nodes of which others may share) and rounds to go."""

    rid: str
    order: int
    path: tuple[PathPart, ...]
    rounds: int
    bound: bool = False
    private: int = 32
    place: Place = Place.ATTACHED
    verified: bool = True
    since: int = 0
    missing: int = 0
    waits: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.path)


class World:
    """
    Args:
        link: tokens that arrive in a step.
        grow: tokens by which a request's private tail grows at each verify.
    """

    def __init__(self, capacity: int, link: int, slack: int = 64, grow: int = 4) -> None:
        self.capacity, self.link, self.slack, self.grow = capacity, link, slack, grow
        self.waiting: list[Simulated] = []
        self.running: list[Simulated] = []
        self.resident: set[int] = set()
        self.sizes: dict[int, int] = {}
        self.step_number = self.fetched = self.verifies = self.retracted = 0
        self.finished: list[Simulated] = []
        self.refused_wanted = 0
        self._fetching: list[Simulated] = []

    # What the pool says.

    def locked(self) -> set[int]:
        return {
            part.node_id for r in self.running if r.place is not Place.DETACHED for part in r.path
        }

    @property
    def free(self) -> int:
        """Below 0 between a step in which tails grew and the retraction that follows."""
        held = sum(self.sizes[n] for n in self.locked())
        return self.capacity - held - sum(r.private for r in self.running)

    def submit(self, request: Simulated) -> None:
        for part in request.path:
            self.sizes[part.node_id] = part.tokens
        self.waiting.append(request)

    # One scheduler step.

    def step(self) -> None:
        self.step_number += 1
        wanted = self._admit()
        self._retract()
        runners = [self._runner(r) for r in self.running]
        moves = plan_moves(runners, Memory(self.free, self.slack, wanted))
        by_rid = {r.rid: r for r in self.running}
        if wanted and not moves.wanted:
            self.refused_wanted += 1
        for rid in moves.detach:
            request = by_rid[rid]
            assert request.place is Place.ATTACHED and not request.bound and request.verified
            request.place, request.since = Place.DETACHED, self.step_number
        for rid in moves.fetch:
            self._order(by_rid[rid])
        assert self.free >= 0, "more is locked and private than the pool holds"
        self._transfer()
        self._verify()

    def _runner(self, r: Simulated) -> Runner:
        return Runner(r.rid, r.order, r.path, r.place, r.since, r.verified and not r.bound, r.bound)

    def _admit(self) -> int:
        """Admit from the head of the queue; what the next one lacks."""
        while self.waiting:
            request = self.waiting[0]
            private = sum(r.private + self.grow * r.rounds for r in self.running)
            private += request.private + self.grow * request.rounds
            paths = [r.tokens for r in (*self.running, request)]
            if not is_sound(paths, self.capacity - private - self.slack):
                return 0
            needs = sum(p.tokens for p in request.path if p.node_id not in self.locked())
            needs += request.private + self.slack
            if needs > self.free:
                return needs
            self.waiting.pop(0)
            request.place, request.verified = Place.ATTACHED, True
            self.running.append(request)
            self._bring_in(request)
        return 0

    def _bring_in(self, request: Simulated) -> None:
        """Its nodes are on the device; what nobody locks may have to leave for that."""
        self.resident |= {part.node_id for part in request.path}
        idle = sorted(self.resident - self.locked())
        private = sum(r.private for r in self.running)
        used = sum(self.sizes[n] for n in self.resident) + private
        while used > self.capacity:
            node = idle.pop(0)
            self.resident.remove(node)
            used -= self.sizes[node]

    def _retract(self) -> None:
        while len(self.running) > 1:
            private = sum(r.private for r in self.running)
            lockable = self.capacity - private - self.slack
            if is_sound([r.tokens for r in self.running], lockable) and self.free >= 0:
                return
            request = self.running.pop()
            self._fetching = [r for r in self._fetching if r is not request]
            request.place, request.verified, self.retracted = (
                Place.DETACHED,
                False,
                self.retracted + 1,
            )
            self.waiting.insert(0, request)

    def _order(self, request: Simulated) -> None:
        assert request.place is Place.DETACHED
        older = [r for r in self.running if r.place is Place.DETACHED and r.since < request.since]
        needs = sum(p.tokens for p in request.path if p.node_id not in self.locked())
        assert not older or needs == 0, "the queue was overtaken"
        missing = [p for p in request.path if p.node_id not in self.resident]
        request.missing = sum(p.tokens for p in missing)
        request.place, request.verified = Place.FETCHING, False
        self._bring_in(request)
        self.fetched += request.missing
        self._fetching.append(request)

    def _transfer(self) -> None:
        left = self.link
        while self._fetching and left > 0:
            request = self._fetching[0]
            moved = min(left, request.missing)
            request.missing -= moved
            left -= moved
            if request.missing:
                return
            self._fetching.pop(0)
            request.place = Place.ATTACHED
            request.waits.append(self.step_number - request.since)

    def _verify(self) -> None:
        for request in list(self.running):
            if request.place is not Place.ATTACHED:
                continue
            assert {p.node_id for p in request.path} <= self.resident, "verified without its KV"
            request.verified = True
            request.rounds -= 1
            request.private += self.grow
            self.verifies += 1
            if request.rounds <= 0:
                self.running.remove(request)
                self.finished.append(request)

    def run(self, most_steps: int) -> None:
        while self.waiting or self.running:
            self.step()
            assert self.step_number < most_steps, (
                f"{len(self.running)} running and {len(self.waiting)} waiting after "
                f"{most_steps} steps: {[(r.rid, r.place, r.since) for r in self.running][:5]}"
            )


def requests(
    seed: int, count: int, shortest: int, longest: int, rounds: int, shared: float, bound: float
) -> list[Simulated]:
    """Random requests, some of which share prefixes and some of which cannot be detached."""
    rng = random.Random(seed)
    found = []
    for order in range(count):
        tokens = rng.randint(shortest, longest)
        parts = []
        if rng.random() < shared:
            group = rng.randrange(max(1, count // 8))
            size = shortest // 2 + (group * 37) % (shortest // 2)
            parts.append(PathPart(1_000_000 + group, size))
            tokens = max(1, tokens - size)
        parts.append(PathPart(order, tokens))
        found.append(
            Simulated(
                f"r{order}",
                order,
                tuple(parts),
                rng.randint(1, rounds),
                bound=rng.random() < bound,
            )
        )
    return found
