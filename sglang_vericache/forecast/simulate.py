"""The rotation policy against costs by bytes, step by step. Pure.

Decoding is limited by bytes here: a forward reads the weights once, and of each request in it
the KV that it attends to. A fetch moves a path's KV over the link while forwards run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sglang_vericache.config import AUTO, VeriCacheConfig
from sglang_vericache.forecast.hardware import Card
from sglang_vericache.forecast.shape import Shape
from sglang_vericache.loader.planner import (
    Costs,
    Memory,
    PathPart,
    Place,
    Runner,
    is_sound,
    keeps_paths_together,
    plan_moves,
)
from sglang_vericache.rounds.agreement import expected_yields

# Beside reading bytes, each forward and each scheduler step takes this long.
FORWARD_S, STEP_S = 0.4e-3, 1.5e-3
# A scheduler step is kept to about this long: drafting a round takes several.
LONGEST_STEP_S = 30e-3
# Waiting verifies beyond which nobody is admitted (rounds/rotation.py).
MOST_IDLE = 4


@dataclass(frozen=True)
class Load:
    """Requests that come all at once.

    Attributes:
        context, output: tokens of each.
        prefixes: groups that share ``shared`` tokens of their context; 0 when nobody shares.
    """

    requests: int
    context: int
    output: int
    prefixes: int = 0
    shared: int = 0

    def path_of(self, number: int) -> tuple[PathPart, ...]:
        if not self.prefixes:
            return (PathPart(number, self.context),)
        group = number % self.prefixes
        own = max(self.context - self.shared, 1)
        return (PathPart(-1 - group, self.shared), PathPart(number, own))


@dataclass(frozen=True)
class Draft:
    """How drafting goes.

    Attributes:
        horizon: tokens drafted in a round.
        yields: tokens that a round brings, the full model's own included.
        kept: share of the KV bytes that a draft reads.
    """

    horizon: int = VeriCacheConfig.horizon
    yields: float = 10.0
    kept: float = 0.1

    @property
    def deepest(self) -> int:
        """Tokens that a request drafts while it waits for its full KV."""
        return VeriCacheConfig(horizon=self.horizon, offload=AUTO).deepest

    @cached_property
    def agreement(self) -> float:
        """The chance of each drafted token with which a horizon brings ``yields``."""
        low, high = 0.0, 1 - 1e-9
        for _ in range(30):
            chance = (low + high) / 2
            if expected_yields(chance, self.horizon) < self.yields:
                low = chance
            else:
                high = chance
        return high

    def tokens(self, drafted: int) -> float:
        """That a round of so many drafted tokens brings."""
        return float(expected_yields(self.agreement, drafted))


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        tokens_per_s: output tokens from the beginning to the last one.
        together: most requests that ran at a time.
        link_use: share of the time in which the link was busy.
        slowest: seconds of the slowest request by those of the median one.
    """

    tokens_per_s: float
    together: int
    link_use: float = 0.0
    slowest: float = 1.0


@dataclass
class _Request:
    number: int
    path: tuple[PathPart, ...]
    left: float
    began: float = 0.0
    place: Place = Place.ATTACHED
    verified: bool = True
    since: int = 0
    drafted: int = 0
    ready: bool = False

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.path)


@dataclass
class _Pool:
    """Which nodes are there, least recently locked first."""

    resident: dict[int, int] = field(default_factory=dict)

    def bring(self, path: Sequence[PathPart], locked: set[int], capacity: int) -> int:
        """Tokens that have to be copied for the path to be there."""
        missing = 0
        for part in path:
            missing += part.tokens if part.node_id not in self.resident else 0
            self.resident.pop(part.node_id, None)
            self.resident[part.node_id] = part.tokens
        used = sum(self.resident.values())
        for node in list(self.resident):
            if used <= capacity:
                break
            if node not in locked:
                used -= self.resident.pop(node)
        return missing


def simulate_plain(shape: Shape, card: Card, load: Load, capacity: int) -> Outcome:
    """Plain decoding, as many at a time as fit."""
    return _simulate(shape, card, load, capacity, None, offload=False)


def simulate_attached(shape: Shape, card: Card, load: Load, capacity: int, draft: Draft) -> Outcome:
    """Drafting, everything on the device."""
    return _simulate(shape, card, load, capacity, draft, offload=False)


def simulate_offload(shape: Shape, card: Card, load: Load, capacity: int, draft: Draft) -> Outcome:
    """Drafting, with requests that rotate through the host.

    Args:
        capacity: tokens of the main pool.
    """
    return _simulate(shape, card, load, capacity, draft, offload=True)


def _simulate(
    shape: Shape, card: Card, load: Load, capacity: int, draft: Draft | None, offload: bool
) -> Outcome:
    width = 1
    if draft is not None:
        width += draft.deepest if offload else draft.horizon
    private = load.output + 2 * width
    waiting = deque(_Request(n, load.path_of(n), load.output) for n in range(load.requests))
    running: list[_Request] = []
    fetches: deque[tuple[_Request, float]] = deque()
    pool = _Pool()
    sizes: dict[int, int] = {}
    now = link_busy = 0.0
    spans: list[float] = []
    step = together = idle = 0
    costs = costs_of(shape, card, load, capacity, draft) if offload and draft else None
    yields = [] if draft is None else [draft.tokens(n) for n in range(draft.deepest + 1)]

    def locked() -> set[int]:
        return {p.node_id for r in running if r.place is not Place.DETACHED for p in r.path}

    while waiting or running:
        step += 1
        held = locked()
        free = capacity - sum(sizes[n] for n in held) - private * len(running)
        wanted = 0
        while waiting:
            request = waiting[0]
            needs = sum(p.tokens for p in request.path if p.node_id not in held) + private
            paths = [r.tokens for r in (*running, request)]
            lockable = capacity - private * len(running)
            sound = is_sound(paths, lockable - private)
            if needs > free or any(r.place is not Place.ATTACHED for r in running):
                sound = sound and keeps_paths_together(paths, lockable, private)
            if running and (idle >= MOST_IDLE or not sound):
                break
            if needs > free and running:
                wanted = needs if costs is not None and costs.pays else 0
                break
            waiting.popleft()
            request.began = now
            running.append(request)
            sizes.update({p.node_id: p.tokens for p in request.path})
            held = locked()
            pool.bring(request.path, held, capacity - private * len(running))
            free -= needs
        together = max(together, len(running))
        if offload and costs is not None:
            runners = [
                Runner(str(r.number), r.number, r.path, r.place, r.since, r.verified, ready=r.ready)
                for r in running
            ]
            staged = costs.staged(None if wanted else len(running))
            moves = plan_moves(runners, Memory(free, 0, wanted), staged=staged)
            by_rid = {str(r.number): r for r in running}
            for rid in moves.detach:
                request = by_rid[rid]
                request.place, request.since, request.ready = Place.DETACHED, step, False
            for rid in moves.fetch:
                request = by_rid[rid]
                request.place, request.verified = Place.FETCHING, False
                missing = pool.bring(request.path, locked(), capacity - private * len(running))
                fetches.append((request, missing * shape.token_bytes / card.link_rate))
        seconds = STEP_S
        horizon = 0 if draft is None else draft.horizon
        deepest = 0 if draft is None else draft.deepest
        limits = {r.number: horizon if r.place is Place.ATTACHED else deepest for r in running}
        drafting = [r for r in running if r.drafted < limits[r.number]]
        if draft is not None and drafting:
            draft_bytes = sum(r.tokens for r in drafting) * shape.token_bytes * draft.kept
            forward = (shape.weight_bytes + draft_bytes) / card.memory_rate + FORWARD_S
            count = max(
                1,
                min(
                    int(LONGEST_STEP_S / forward),
                    max(limits[r.number] - r.drafted for r in drafting),
                ),
            )
            if costs is not None and any(r.place is not Place.ATTACHED for r in running):
                count = min(count, costs.share)
            seconds += count * forward
            for r in drafting:
                r.drafted = min(r.drafted + count, limits[r.number])
        reading = [r for r in running if r.place is Place.ATTACHED and r.drafted >= horizon]
        if reading:
            bytes_read = sum(r.tokens for r in reading) * shape.token_bytes
            seconds += (shape.weight_bytes + bytes_read) / card.memory_rate + FORWARD_S
        elif not drafting and fetches:
            seconds = max(seconds, fetches[0][1])  # nobody can do anything before
        # The link works meanwhile.
        left = seconds
        while fetches and left > 0:
            request, seconds_left = fetches.popleft()
            moved = min(left, seconds_left)
            left -= moved
            link_busy += moved
            if seconds_left > moved:
                fetches.appendleft((request, seconds_left - moved))
            else:
                request.place = Place.ATTACHED
        now += seconds
        for request in reading:
            request.left -= 1.0 if draft is None else yields[request.drafted]
            request.verified, request.drafted = True, 0
            if request.left <= 0:
                running.remove(request)
                spans.append(now - request.began)
        waiting_verifies = [
            r for r in running if r.place is not Place.ATTACHED and r.drafted >= horizon
        ]
        for request in waiting_verifies:
            if not request.ready:
                request.ready, request.since = True, step
        idle = sum(r.drafted >= draft.deepest for r in waiting_verifies) if draft else 0
    spans.sort()
    return Outcome(
        load.requests * load.output / now,
        together,
        link_busy / now,
        spans[-1] / spans[len(spans) // 2],
    )


def costs_of(shape: Shape, card: Card, load: Load, capacity: int, draft: Draft) -> Costs:
    """Of requests that all stay attached, as many as fit."""
    fits = max(1, min(load.requests, capacity // (load.context + load.output)))
    path = load.context * shape.token_bytes
    forward = (shape.weight_bytes + fits * path * draft.kept) / card.memory_rate + FORWARD_S
    verify = (shape.weight_bytes + fits * path) / card.memory_rate + FORWARD_S
    steps = math.ceil(draft.horizon / max(1, min(draft.horizon, int(LONGEST_STEP_S / forward))))
    round_s = draft.horizon * forward + verify + steps * STEP_S
    alone = (shape.weight_bytes + path) / card.memory_rate + FORWARD_S
    tokens = draft.yields
    link_s, deep = path / card.link_rate, draft.tokens(draft.deepest)
    return Costs(fits, round_s, round_s / steps, alone, link_s, tokens, tokens, deep)


def pool_tokens(shape: Shape, card: Card, kept: float, fraction: float = 0.85) -> int:
    """Tokens of the main pool beside the weights and the compressed caches."""
    room = card.memory_bytes * fraction - shape.weight_bytes
    return max(int(room / (shape.token_bytes * (1 + kept))), 0)
