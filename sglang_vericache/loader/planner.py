"""Where the full KV of each running request lies next. Pure.

As many requests as fit stay attached and are verified in place. The others rotate through what
is left of the pool, the staging share: fetched, verified, detached, at the end of the queue again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

# Where nothing is known yet the staging share holds this many of the longest rotating paths: one is
# verified while the next one arrives.
STAGED_PATHS = 2
# More than this part of the pool is not taken from requests that could stay attached.
STAGING_SHARE = 0.5
# Rotation must promise this much more than keeping everything attached.
MARGIN = 1.05


class Place(Enum):
    """Of a request's full KV."""

    ATTACHED = "attached"
    DETACHED = "detached"
    FETCHING = "fetching"


@dataclass(frozen=True)
class PathPart:
    """A node of the radix tree on a request's path."""

    node_id: int
    tokens: int


@dataclass(frozen=True)
class Runner:
    """A running request as the planner sees it.

    Attributes:
        rid: its id.
        order: by admission; requests admitted earlier stay attached rather than later ones.
        path: from the root; requests that share a node name the same id.
        place: of the path.
        since: when it was detached, or when it became ready; the queue is in this order.
        ready: it has drafted all it may. Who is not is fetched only while nobody who is waits.
        movable: it may be detached now: it has a draft view, a complete copy on the host, and has
            been verified since it was attached.
        bound: it can never be detached: it is decoded plainly.
    """

    rid: str
    order: int
    path: tuple[PathPart, ...]
    place: Place
    since: int = 0
    movable: bool = False
    bound: bool = False
    ready: bool = False

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.path)


@dataclass(frozen=True)
class Memory:
    """The main pool, in tokens.

    Attributes:
        free: neither locked nor private: what may still be locked or allocated.
        slack: of that, to be left alone: the tails of the coming steps, and the rest of a prompt
            that is being prefilled in chunks.
        wanted: that the next request of the waiting queue needs free; 0 when it needs nothing.
    """

    free: int
    slack: int
    wanted: int = 0


@dataclass(frozen=True)
class Moves:
    """What to do, in this order.

    Attributes:
        detach: ids of requests whose path is given up.
        fetch: ids of requests whose path is locked, and fetched as far as it is not there.
        rotating: ids of those that do not stay attached.
        wanted: what is still tried to free for the waiting queue; 0 when that is hopeless.
    """

    detach: tuple[str, ...]
    fetch: tuple[str, ...]
    rotating: frozenset[str]
    wanted: int


class _Nodes:
    """A set of nodes and what it weighs."""

    def __init__(self, runners: Iterable[Runner] = ()) -> None:
        self._tokens: dict[int, int] = {}
        self.tokens = 0
        for runner in runners:
            self.add(runner)

    def missing(self, runner: Runner) -> int:
        """Tokens of the path that are not in the set."""
        return sum(part.tokens for part in runner.path if part.node_id not in self._tokens)

    def add(self, runner: Runner) -> None:
        for part in runner.path:
            if part.node_id not in self._tokens:
                self._tokens[part.node_id] = part.tokens
                self.tokens += part.tokens


def plan_moves(
    runners: Sequence[Runner],
    memory: Memory,
    may_rotate: bool = True,
    staged: int = STAGED_PATHS,
) -> Moves:
    """Decide who is detached and who is fetched.

    No overtaking: when the longest waiting request does not fit yet, only those follow that need
    nothing of their own, because everything on their path is locked already.

    Args:
        may_rotate: False when nobody is to be detached any more.
        staged: paths that the staging share should hold.
    """
    locked = _Nodes(r for r in runners if r.place is not Place.DETACHED)
    lockable = memory.free - memory.slack + locked.tokens
    bound = _Nodes(r for r in runners if r.bound)
    wanted = memory.wanted if memory.wanted <= lockable - bound.tokens else 0
    kept = _kept(runners, lockable, wanted, staged)
    rotating = frozenset(r.rid for r in runners if r.rid not in kept)

    queue = sorted((r for r in runners if r.place is Place.DETACHED), key=_turn)
    detach: list[Runner] = []
    # Room that is wanted by others, one way or the other; without, nobody has to go.
    if may_rotate and (queue or wanted or memory.free < memory.slack):
        detach = [
            r
            for r in runners
            if r.place is Place.ATTACHED and r.movable and not r.bound and r.rid in rotating
        ]
    leaving = {r.rid for r in detach}
    left = _Nodes(r for r in runners if r.place is not Place.DETACHED and r.rid not in leaving)
    room = memory.free + locked.tokens - left.tokens - memory.slack - wanted
    fetch: list[str] = []
    blocked = False
    for runner in queue:
        needs = left.missing(runner)
        if needs > room or (blocked and needs):
            blocked = True
            continue
        left.add(runner)
        room -= needs
        fetch.append(runner.rid)
    return Moves(tuple(r.rid for r in detach), tuple(fetch), rotating, wanted)


def _turn(runner: Runner) -> tuple[bool, int, int]:
    return not runner.ready, runner.since, runner.order


def _kept(runners: Sequence[Runner], lockable: int, wanted: int, staged: int) -> set[str]:
    """Ids of the requests that stay attached."""
    everything = _Nodes(runners)
    if everything.tokens + wanted <= lockable:
        return {r.rid for r in runners}
    nodes = _Nodes(r for r in runners if r.bound)
    kept = {r.rid for r in runners if r.bound}
    others = sorted((r for r in runners if not r.bound), key=lambda r: r.order)
    longest = max((r.tokens for r in others), default=0)
    staging = max(longest, wanted, min(staged * longest, int(STAGING_SHARE * lockable)))
    for runner in others:
        if nodes.tokens + nodes.missing(runner) > lockable - staging:
            break
        nodes.add(runner)
        kept.add(runner.rid)
    return kept


@dataclass(frozen=True)
class Costs:
    """Measured or foreseen, in seconds.

    Attributes:
        fits: requests that can stay attached when nobody rotates.
        round_s: between two verifies of such a request.
        step_s: of a scheduler step: a path that has arrived waits for the next one.
        forward_s: that one more verify pass adds to a step.
        fetch_s: for the longest path to arrive.
    """

    fits: int
    round_s: float
    step_s: float
    forward_s: float
    fetch_s: float

    @property
    def staged(self) -> int:
        """Paths of which the staging share keeps the link busy: those that arrive in a step,
        and those that are being verified. Not more than fit."""
        busy = 1 + max(1, math.ceil(self.step_s / max(self.fetch_s, 1e-6)))
        return max(1, min(busy, self.fits))

    @property
    def pays(self) -> bool:
        """Whether more requests are verified in a second. Who stays is verified once a round,
        which gets longer: paths come one by one, and each step verifies what has come. A path in
        the staging share is fetched, waits for a step, is verified, and leaves with the next."""
        step_s = self.step_s + self.forward_s
        round_s = self.round_s * step_s / self.step_s
        by_link = 1 / max(self.fetch_s, 1e-6)
        by_room = self.staged / (self.fetch_s + 2 * step_s)
        rotating = max(self.fits - self.staged, 0) / round_s + min(by_link, by_room)
        return rotating > MARGIN * self.fits / self.round_s


def is_sound(paths: Iterable[int], lockable: int) -> bool:
    """Whether each request can be attached when it is alone: the invariant of admission and of
    every step. When it breaks, somebody must be retracted.

    Args:
        paths: tokens of each running request's path.
        lockable: tokens of the pool that are not private to a request or kept in reserve.
    """
    return max(paths, default=0) <= lockable
