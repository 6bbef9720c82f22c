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
# verified while the next one arrives. It takes no more than this part of the pool then.
STAGED_PATHS = 2
STAGING_SHARE = 0.5
# Rotation must promise this much more than keeping everything attached: that more requests draft,
# and make rounds longer, is not foreseen.
MARGIN = 1.15


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
    staged: int | None = None,
) -> Moves:
    """Decide who is detached and who is fetched.

    No overtaking: when the longest waiting request does not fit yet, only those follow that need
    nothing of their own, because everything on their path is locked already.

    Args:
        may_rotate: False when nobody is to be detached any more.
        staged: paths that the staging share should hold; None where that is not known.
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


def _kept(runners: Sequence[Runner], lockable: int, wanted: int, staged: int | None) -> set[str]:
    """Ids of the requests that stay attached."""
    everything = _Nodes(runners)
    if everything.tokens + wanted <= lockable:
        return {r.rid for r in runners}
    nodes = _Nodes(r for r in runners if r.bound)
    kept = {r.rid for r in runners if r.bound}
    others = sorted((r for r in runners if not r.bound), key=lambda r: r.order)
    longest = max((r.tokens for r in others), default=0)
    if staged is None:
        staging = min(STAGED_PATHS * longest, int(STAGING_SHARE * lockable))
    else:
        # A part of a path stages nobody.
        staging = min(staged, lockable // max(longest, 1)) * longest
    staging = max(staging, longest, wanted)
    for runner in others:
        if nodes.tokens + nodes.missing(runner) > lockable - staging:
            break
        nodes.add(runner)
        kept.add(runner.rid)
    return kept


def how_many_fit(runners: Sequence[Runner], memory: Memory) -> int:
    """Of the longest path, beside one another: 1 where not even that fits."""
    locked = _Nodes(r for r in runners if r.place is not Place.DETACHED)
    longest = max((r.tokens for r in runners), default=0)
    return max(1, (memory.free - memory.slack + locked.tokens) // max(longest, 1))


@dataclass(frozen=True)
class Costs:
    """Measured or foreseen, in seconds and tokens.

    Attributes:
        fits: requests that can stay attached when nobody rotates.
        round_s: between two verifies of such a request.
        step_s: of a scheduler step: a path that has arrived waits for the next one.
        forward_s: that one more verify pass adds to a step.
        fetch_s: for the longest path to arrive.
        kept_tokens: that a verify of a request that stays brings; of one that stays in plain
            decoding, what a step brings.
        fetched_tokens: that a verify of a rotating request brings which has drafted a horizon.
        deep_tokens: the same of one that has drafted all it may, because it waited so long for the
            link; None where nobody drafts more than a horizon.
    """

    fits: int
    round_s: float
    step_s: float
    forward_s: float
    fetch_s: float
    kept_tokens: float = 1.0
    fetched_tokens: float = 1.0
    deep_tokens: float | None = None

    def rate(self, staged: int, running: int | None = None) -> float:
        """Tokens a second with room for so many paths in the staging share.

        Who stays is verified once a round, which gets longer: paths come one by one, and each step
        verifies what has come. A path in the staging share is fetched, waits for a step, is
        verified, and leaves with the next; and nobody is verified before a round is drafted.

        Args:
            running: requests; None where more would come.
        """
        step_s = self.step_s + self.forward_s
        round_s = self.round_s * step_s / max(self.step_s, 1e-6)
        verifies = min(1 / max(self.fetch_s, 1e-6), staged / (self.fetch_s + 2 * step_s))
        kept = max(self.fits - staged, 0)
        rounds = math.inf  # that a rotating request has time for between two verifies
        if running is not None:
            rotating = max(running - kept, 0)
            verifies = min(verifies, rotating / round_s)
            rounds = rotating / verifies / round_s if verifies else 1.0
        return kept * self.kept_tokens / round_s + verifies * self._tokens(rounds)

    def _tokens(self, rounds: float) -> float:
        """Of a verify after the time of so many rounds, in which up to two are drafted."""
        deep = max(self.deep_tokens or 0.0, self.fetched_tokens)
        return self.fetched_tokens + min(max(rounds - 1, 0), 1) * (deep - self.fetched_tokens)

    def staged(self, running: int | None = None) -> int:
        """Paths in the staging share with which that rate is best. Room for as many as keep the
        link busy is enough."""
        step_s = self.step_s + self.forward_s
        busy = math.ceil(1 + 2 * step_s / max(self.fetch_s, 1e-6))
        choices = range(1, min(self.fits, busy) + 1)
        return max(choices, key=lambda staged: (self.rate(staged, running), -staged))

    @property
    def share(self) -> int:
        """Most tokens to draft in a step beside a verify, with which the link need not wait: while
        a path in the staging share is on its way, the others there wait for a step, are verified,
        and leave with the next. A single one makes the link wait, but not for long."""
        longest_s = (self.fits - 1) * self.fetch_s / 2
        return max(int(longest_s / max(self.forward_s, 1e-6)) - 1, 1)

    @property
    def pays(self) -> bool:
        """Whether some rotation brings more than keeping everything attached."""
        attached = self.fits * self.kept_tokens / max(self.round_s, 1e-6)
        return self.rate(self.staged()) > MARGIN * attached


def is_sound(paths: Iterable[int], lockable: int) -> bool:
    """Whether each request can be attached when it is alone: the invariant of admission and of
    every step. When it breaks, somebody must be retracted.

    Args:
        paths: tokens of each running request's path.
        lockable: tokens of the pool that are not private to a request or kept in reserve.
    """
    return max(paths, default=0) <= lockable


def keeps_paths_together(paths: Iterable[int], lockable: int, growth: int) -> bool:
    """Whether the longest path still fits as often beside itself, up to STAGED_PATHS times, when
    one more request takes ``growth`` of the pool for what it generates: else no path arrives any
    more while another is verified, and more requests are served more slowly."""
    longest = max(paths, default=0)
    return lockable - growth >= min(STAGED_PATHS, lockable // max(longest, 1)) * longest
