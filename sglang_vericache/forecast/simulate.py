"""The rotation policy and admission against what forwards take, step by step. Pure.

All prompts lie in the host's memory before the clock starts. A prefill brings those of the requests
that it admits, and nobody decodes meanwhile; a fetch moves a path's KV over the link while forwards
run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_vericache.forecast.costs import LONGEST_STEP_S, STEP_S, best_horizon, costs_of
from sglang_vericache.forecast.hardware import Card
from sglang_vericache.forecast.load import Draft, Load, Outcome
from sglang_vericache.forecast.shape import Shape
from sglang_vericache.forecast.timing import Timing
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
from sglang_vericache.rounds.admission import Admission
from sglang_vericache.rounds.controller import PLAIN
from sglang_vericache.rounds.prompt_fetch import LEAST_S as LEAST_PROMPT_S
from sglang_vericache.rounds.step_watch import ENOUGH_S, REMEMBERED_S

# Waiting verifies beyond which nobody is admitted (rounds/rotation.py).
MOST_IDLE = 4


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
    coming: float | None = None

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.path)


@dataclass
class _Pool:
    """Which nodes are there, least recently locked first."""

    resident: dict[int, int] = field(default_factory=dict)

    def missing(self, path: Sequence[PathPart]) -> int:
        """Tokens of it that are not there."""
        return sum(part.tokens for part in path if part.node_id not in self.resident)

    def bring(self, path: Sequence[PathPart], locked: set[int], capacity: int) -> int:
        """Tokens that have to be copied for the path to be there."""
        missing = self.missing(path)
        for part in path:
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
    return _Simulation(shape, card, load, capacity, None, offload=False).run()


def simulate_attached(shape: Shape, card: Card, load: Load, capacity: int, draft: Draft) -> Outcome:
    """Drafting, everything on the device."""
    return _Simulation(shape, card, load, capacity, draft, offload=False).run()


def simulate_offload(shape: Shape, card: Card, load: Load, capacity: int, draft: Draft) -> Outcome:
    """Drafting, with requests that rotate through the host.

    Args:
        capacity: tokens of the main pool.
    """
    return _Simulation(shape, card, load, capacity, draft, offload=True).run()


class _Simulation:
    """One run of one server."""

    def __init__(
        self,
        shape: Shape,
        card: Card,
        load: Load,
        capacity: int,
        draft: Draft | None,
        offload: bool,
    ) -> None:
        self.timing = Timing(shape, card)
        self.load, self.capacity, self.draft = load, capacity, draft
        width = 1
        if draft is not None:
            width += draft.deepest if offload else draft.horizon
        self.private = load.output + 2 * width
        self.waiting = deque(
            _Request(n, load.path_of(n), load.output) for n in range(load.requests)
        )
        self.running: list[_Request] = []
        self.fetches: deque[tuple[_Request, float]] = deque()
        self.pool = _Pool()
        self.sizes: dict[int, int] = {}
        self.now = self.link_busy = 0.0
        self.spans: list[float] = []
        self.step = self.together = self.idle = self.detached = 0
        self._turning: set[int] = set()
        self._chosen = PLAIN if draft is None else draft.horizon
        self._rotated, self._loses = (0.0, 0.0), False  # tokens and seconds of rotating steps
        self.costs = costs_of(shape, card, load, capacity, draft) if offload and draft else None
        self.yields = [] if draft is None else [draft.tokens(n) for n in range(draft.deepest + 1)]
        together = draft is not None and draft.admits_together
        self.admission = Admission(lambda: self.now) if together else None

    def run(self) -> Outcome:
        while self.waiting or self.running:
            self.step += 1
            wanted = self._admit()
            self.together = max(self.together, len(self.running))
            if self.admission is not None:
                self.admission.step(len(self.running))
            if self.costs is not None:
                self._move(self.costs, wanted)
            self._decode()
        self.spans.sort()
        return Outcome(
            self.load.requests * self.load.output / self.now,
            self.together,
            self.link_busy / self.now,
            self.spans[-1] / self.spans[len(self.spans) // 2],
            self.detached,
        )

    def _locked(self) -> set[int]:
        return {p.node_id for r in self.running if r.place is not Place.DETACHED for p in r.path}

    @property
    def _free(self) -> int:
        held = sum(self.sizes[n] for n in self._locked())
        return self.capacity - held - self.private * len(self.running)

    def _bring(self, request: _Request) -> int:
        room = self.capacity - self.private * len(self.running)
        return self.pool.bring(request.path, self._locked(), room)

    def _admit(self) -> int:
        """A prefill of those that fit; tokens that the next one of the queue lacks."""
        admitted = loaded = wanted = 0
        while self.waiting:
            request, held, running = self.waiting[0], self._locked(), self.running
            needs = sum(p.tokens for p in request.path if p.node_id not in held) + self.private
            paths = [r.tokens for r in (*running, request)]
            lockable = self.capacity - self.private * len(running)
            sound = is_sound(paths, lockable - self.private)
            away = any(r.place is not Place.ATTACHED for r in running)
            if needs > self._free or away:
                sound = sound and keeps_paths_together(paths, lockable, self.private)
            if running and (self.idle >= MOST_IDLE or not sound or (away and not self._pays)):
                break
            if needs > self._free and running:
                wanted = needs if self._pays else 0
                break
            if self._brings_first(request):
                break
            if not admitted and request.coming is None and self._holds(needs):
                break
            self.waiting.popleft()
            request.began = self.now
            running.append(request)
            self.sizes.update({p.node_id: p.tokens for p in request.path})
            admitted, loaded = admitted + 1, loaded + self._bring(request)
        if admitted:
            self._prefill(admitted, self.timing.loading(loaded))
        return wanted

    def _holds(self, needs: int) -> bool:
        admission = self.admission
        # While requests rotate, room is made for whoever waits.
        if admission is None or self._pays:
            return False
        return admission.holds(self._free // needs, len(self.waiting))

    def _brings_first(self, request: _Request) -> bool:
        """Whether a request waits for its prompt, which comes while others decode."""
        if self.draft is None or not self.draft.brings_prompts or self.costs is None:
            return False
        if self._pays or not self.running:
            return False
        if request.coming is None:
            seconds = self.timing.loading(self.pool.missing(request.path))
            if seconds < max(LEAST_PROMPT_S, self.timing.prefill()):
                return False
            request.coming = seconds
        if request.coming <= 0:
            self._bring(request)
        return request.coming > 0

    def _prefill(self, requests: int, loading: float) -> None:
        launching = self.timing.prefill()
        if self.admission is not None:
            self.admission.prefill(requests, loading)
        self.now += launching
        if self.admission is not None:
            self.admission.launched()
        self.now += max(loading - launching, 0.0)
        self.link_busy += loading

    def _move(self, costs: Costs, wanted: int) -> None:
        """Detach and fetch as the server's planner says."""
        runners = [
            Runner(str(r.number), r.number, r.path, r.place, r.since, r.verified, ready=r.ready)
            for r in self.running
        ]
        staged = costs.staged(None if wanted else len(self.running))
        moves = plan_moves(runners, Memory(self._free, 0, wanted), staged=staged)
        by_rid = {str(r.number): r for r in self.running}
        self._turning = {by_rid[rid].number for rid in moves.rotating}
        self.detached += len(moves.detach)
        for rid in moves.detach:
            request = by_rid[rid]
            request.place, request.since, request.ready = Place.DETACHED, self.step, False
        for rid in moves.fetch:
            request = by_rid[rid]
            request.place, request.verified = Place.FETCHING, False
            self.fetches.append((request, self.timing.loading(self._bring(request))))

    def _decode(self) -> None:
        """A step: drafts, and verifies those that have drafted enough and are there."""
        running, draft = self.running, self.draft
        horizon = self._horizon()
        if draft is None or horizon == PLAIN:
            seconds = self.timing.plain(len(running), sum(r.tokens for r in running))
            self._pass(max(seconds, STEP_S), running)
            return
        seconds = STEP_S
        limits = {r.number: self._limit(r, draft, horizon) for r in running}
        drafting = [r for r in running if r.drafted < limits[r.number]]
        if drafting:
            context = sum(r.tokens for r in drafting)
            forward = self.timing.draft(len(drafting), context, draft.kept)
            most = max(limits[r.number] - r.drafted for r in drafting)
            count = max(1, min(int(LONGEST_STEP_S / forward), most))
            if self.costs is not None and any(r.place is not Place.ATTACHED for r in running):
                count = min(count, self.costs.share)
            seconds += count * forward
            for r in drafting:
                r.drafted = min(r.drafted + count, limits[r.number])
        attached = [r for r in running if r.place is Place.ATTACHED and r.drafted]
        staying = [r for r in attached if r.number not in self._turning]
        if not any(r.drafted >= horizon for r in staying):
            staying = []  # else all are in the same round, whenever they joined it
        reading = staying + [
            r for r in attached if r.number in self._turning and r.drafted >= draft.horizon
        ]
        if reading:
            width = max(r.drafted for r in reading) + 1
            # A prefix that several share is read once (verify/cascade.py).
            nodes = {part.node_id: part.tokens for r in reading for part in r.path}
            seconds += self.timing.verify(len(reading), sum(nodes.values()), width)
        elif not drafting and self.fetches:
            seconds = max(seconds, self.fetches[0][1])  # nobody can do anything before
        self._pass(seconds, reading)
        waiting_verifies = [
            r for r in self.running if r.place is not Place.ATTACHED and r.drafted >= draft.horizon
        ]
        for request in waiting_verifies:
            if not request.ready:
                request.ready, request.since = True, self.step
        self.idle = sum(r.drafted >= draft.deepest for r in waiting_verifies)

    def _limit(self, request: _Request, draft: Draft, horizon: int) -> int:
        """Tokens that it drafts before its next verify."""
        if request.place is not Place.ATTACHED:
            return draft.deepest
        return draft.horizon if request.number in self._turning else horizon

    @property
    def _pays(self) -> bool:
        return self.costs is not None and self.costs.pays and not self._loses

    def _watch(self, costs: Costs, tokens: float, seconds: float) -> None:
        """Rotation that brings less than staying did ends, whatever was foreseen (StepWatch)."""
        kept = min(1.0, REMEMBERED_S / (self._rotated[1] + seconds))
        self._rotated = (self._rotated[0] + tokens) * kept, (self._rotated[1] + seconds) * kept
        staying = costs.fits * costs.kept_tokens / costs.round_s
        if self._rotated[1] > ENOUGH_S and self._rotated[0] / self._rotated[1] < staying:
            self._loses = True

    @property
    def _rotating(self) -> bool:
        """Whether requests come and go, or will."""
        if any(r.place is not Place.ATTACHED for r in self.running):
            return True
        return self._pays and bool(self.waiting)

    def _horizon(self) -> int:
        """The one that the controller would choose; in a round, that of its beginning."""
        draft, running = self.draft, self.running
        if draft is None:
            return PLAIN
        rotating = self._rotating
        if rotating or not any(r.drafted for r in running):
            requests, context = len(running), sum(r.tokens for r in running)
            choices = [h for h in draft.horizons if not (rotating and h == PLAIN)]
            self._chosen, _ = best_horizon(self.timing, draft, requests, context, choices)
        return self._chosen

    def _pass(self, seconds: float, reading: Sequence[_Request]) -> None:
        """So long the link works; then those that were read have more tokens."""
        self._work_link(seconds)
        self.now += seconds
        tokens = {request.number: self._yield_of(request) for request in reading}
        if self.costs is not None and any(r.place is not Place.ATTACHED for r in self.running):
            self._watch(self.costs, sum(tokens.values()), seconds)
        for request in list(reading):
            request.left -= tokens[request.number]
            request.verified, request.drafted = True, 0
            if request.left <= 0:
                self.running.remove(request)
                self.spans.append(self.now - request.began)
                if self.admission is not None:
                    self.admission.ended()

    def _yield_of(self, request: _Request) -> float:
        if self.draft is None or not request.drafted:
            return 1.0
        tokens = self.yields[request.drafted] * self.draft.fortune(request.number)
        return min(max(tokens, 1.0), request.drafted + 1)

    def _work_link(self, seconds: float) -> None:
        left = seconds
        while self.fetches and left > 0:
            request, seconds_left = self.fetches.popleft()
            moved = min(left, seconds_left)
            left -= moved
            self.link_busy += moved
            if seconds_left > moved:
                self.fetches.appendleft((request, seconds_left - moved))
            else:
                request.place = Place.ATTACHED
        first = self.waiting[0] if self.waiting else None
        if first is not None and first.coming is not None:
            moved = min(left, max(first.coming, 0.0))
            first.coming -= moved
            self.link_busy += moved
