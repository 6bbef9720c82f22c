"""Where the full KV of each running request lies next. Pure.

As many requests as fit stay attached and are verified in place. The others rotate through what
is left of the pool, the staging share: fetched, verified, detached, at the end of the queue again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

# The staging share holds this many of the longest rotating paths where the pool is large enough:
# one is verified while the next one arrives.
STAGED_PATHS = 2
# ... which must leave this part of the pool to requests that stay attached.
STAGING_SHARE = 0.5


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
        since: when it was detached; the queue is in this order.
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


def plan_moves(runners: Sequence[Runner], memory: Memory, may_rotate: bool = True) -> Moves:
    """Decide who is detached and who is fetched.

    No overtaking: when the longest waiting request does not fit yet, only those follow that need
    nothing of their own, because everything on their path is locked already.

    Args:
        may_rotate: False when nobody is to be detached any more.
    """
    locked = _Nodes(r for r in runners if r.place is not Place.DETACHED)
    lockable = memory.free - memory.slack + locked.tokens
    bound = _Nodes(r for r in runners if r.bound)
    wanted = memory.wanted if memory.wanted <= lockable - bound.tokens else 0
    kept = _kept(runners, lockable, wanted)
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
    left = _Nodes(r for r in runners if r.place is not Place.DETACHED and r not in detach)
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


def _turn(runner: Runner) -> tuple[int, int]:
    return runner.since, runner.order


def _kept(runners: Sequence[Runner], lockable: int, wanted: int) -> set[str]:
    """Ids of the requests that stay attached."""
    everything = _Nodes(runners)
    if everything.tokens + wanted <= lockable:
        return {r.rid for r in runners}
    nodes = _Nodes(r for r in runners if r.bound)
    kept = {r.rid for r in runners if r.bound}
    others = sorted((r for r in runners if not r.bound), key=lambda r: r.order)
    longest = max((r.tokens for r in others), default=0)
    staging = max(STAGED_PATHS * longest, wanted)
    if staging > STAGING_SHARE * lockable:
        staging = max(longest, wanted)
    for runner in others:
        if nodes.tokens + nodes.missing(runner) > lockable - staging:
            break
        nodes.add(runner)
        kept.add(runner.rid)
    return kept


def is_sound(paths: Iterable[int], lockable: int) -> bool:
    """Whether each request can be attached when it is alone: the invariant of admission and of
    every step. When it breaks, somebody must be retracted.

    Args:
        paths: tokens of each running request's path.
        lockable: tokens of the pool that are not private to a request or kept in reserve.
    """
    return max(paths, default=0) <= lockable
