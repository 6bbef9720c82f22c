"""Detaching, fetching and attaching of running requests, step by step.

The planner decides, the residency moves, the loader copies; this tells them what the batch is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_vericache.loader.planner import (
    Memory,
    Place,
    Runner,
    is_sound,
    keeps_paths_together,
    plan_moves,
)
from sglang_vericache.metrics import OffloadNumbers
from sglang_vericache.rounds.draft_room import DraftRoom
from sglang_vericache.rounds.held_prompts import load_reserve
from sglang_vericache.rounds.pace import Choice
from sglang_vericache.rounds.policy import RoundPlan
from sglang_vericache.rounds.prompt_fetch import PromptFetch
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.rounds.rotation_costs import foresee, tell
from sglang_vericache.rounds.step_watch import StepWatch
from sglang_vericache.tree.residency import Residency, Seat

logger = logging.getLogger(__name__)

# Nobody is admitted while so many requests have drafted all they may and wait for their fetch:
# the link is what limits them, and one more would only wait with them.
MOST_IDLE = 4
# A request whose copy on the host is not complete is not asked again for so many steps.
INCOMPLETE_STEPS = 8
# A step in which nobody can do anything waits this long for the next arrival.
IDLE_WAIT_S = 0.005


@dataclass
class RotationCounters:
    """
    Attributes:
        detached, attached: moves so far.
        no_room: fetches put off because the pool had no room after all.
    """

    detached: int = 0
    attached: int = 0
    no_room: int = 0


class Rotation:
    """Of one worker.

    Args:
        verify_width: main slots that a request may take in a step.
        push_tokens: of what a rotating request has generated, to be given to the tree at a time.
        watch: measures whether rotation pays; None rotates whenever memory is short.
        room: of the draft pool; None when that never runs out.
        prompts: brings those of waiting requests; None leaves that to their prefills.

    Attributes:
        pays: more requests than fit are wanted.
    """

    def __init__(
        self,
        residency: Residency,
        allocator: Any,
        verify_width: int,
        push_tokens: int,
        watch: StepWatch | None = None,
        room: DraftRoom | None = None,
        prompts: PromptFetch | None = None,
    ) -> None:
        self.residency, self.allocator = residency, allocator
        self.verify_width, self.push_tokens = verify_width, push_tokens
        self.watch, self.room, self.prompts = watch, room, prompts
        self.counters = RotationCounters()
        self._step = 0
        self._wanted = 0
        self._prefill_rest = 0
        self._idle = 0
        self._short = False
        self._looked_at = -1
        self.pays = watch is None  # nobody leaves on a guess
        self._share: int | None = None
        self._reads: Any = None

    # Asked by the worker

    def before_extend(self, batch: Any) -> None:
        """A prefill is about to run."""
        self._reads = None
        if self.watch is not None:
            self.watch.interrupt()
        chunked = batch.chunked_req
        rest = 0 if chunked is None else len(chunked.full_untruncated_fill_ids) - chunked.extend_end
        self._prefill_rest = max(rest, 0)
        if self.room is not None:
            self.room.prefill(batch.reqs)
        self.residency.changes += 1
        nodes = [self.residency.cache.node_read_by(req) for req in batch.reqs]
        self.residency.wait_for_prefill([node for node in nodes if node is not None])
        # A session's later turns have a node that is none of the tree's.
        self.residency.mend([req for req in batch.reqs if isinstance(req.last_node, int)])

    def step(
        self,
        reqs: Sequence[Any],
        states: Sequence[RequestState],
        committed: Sequence[int],
        views_built: bool,
    ) -> None:
        """Move requests before a decode step is planned; ``full`` and ``rotates`` of the states
        say where they are then.

        Args:
            committed: tokens of each request whose KV is computed.
            views_built: this step has read full KV already.
        """
        self._step += 1
        if views_built:
            self._reads = None
        if self.room is not None:
            self.room.step(self._prefill_rest > 0)
        live = [
            (r, s, n)
            for r, s, n in zip(reqs, states, committed, strict=True)
            # The row of a session outlives its request, and belongs to the session.
            if not s.released and r.session is None
        ]
        seats = [self.residency.seat_of(req) for req, _, _ in live]
        self.counters.attached += len(self.residency.arrive())
        # The reserve of the coming step; of the one after that too, where requests come and go.
        reserve = self.verify_width * len(live) * (2 if self.pays else 1) + self._prefill_rest
        rotating: frozenset[str] = frozenset()
        at_rest = all(seat.place is Place.ATTACHED for seat in seats)
        self._short = not at_rest or self._wanted > 0 or self.free < reserve
        self._share = None
        if self._short:
            rotating = self._move(seats, live, reserve)
        elif self.watch is not None:
            self.pays = False  # nobody need leave: asked again where memory is short
        self._reads = None
        for seat, (_, state, _) in zip(seats, live, strict=True):
            state.full = seat.place is Place.ATTACHED
            state.rotates = seat.req.rid in rotating

    def _move(
        self, seats: Sequence[Seat], live: Sequence[tuple[Any, RequestState, int]], reserve: int
    ) -> frozenset[str]:
        """Plan and carry out; ids of those that do not stay attached."""
        if self._looked_at != self.residency.changes:
            self._looked_at = self.residency.changes
            for seat in seats:
                self.residency.look_at_path(seat)
        for seat, (_, state, _) in zip(seats, live, strict=True):
            if self._is_long(seat, state):
                self.residency.push(seat)
        runners = [
            self._runner(seat, state, length)
            for seat, (_, state, length) in zip(seats, live, strict=True)
        ]
        memory = Memory(self.free, reserve)
        costs = None
        if self.watch is not None:
            copies = self.residency.loader.counters
            costs = foresee(self.watch, copies, runners, memory, [state for _, state, _ in live])
            self.pays = costs is not None and costs.pays and not self.watch.rotation_loses
        memory = replace(memory, wanted=self._wanted if self.pays else 0)
        # More requests come where the next one has asked for room.
        running = None if memory.wanted else len(runners)
        staged = None if costs is None else costs.staged(running)
        self._wanted = 0
        alive = self.residency.loader.alive
        moves = plan_moves(runners, memory, alive, staged)
        self._share = costs.share if costs is not None and moves.rotating else None
        by_rid = {seat.req.rid: seat for seat in seats}
        all_went = True
        for rid in moves.detach:
            if self.residency.is_complete(by_rid[rid]):
                self.residency.detach(by_rid[rid], self._step)
                self.counters.detached += 1
            else:
                # Its copy to the host is under way, or found no room there.
                all_went, by_rid[rid].stays_until = False, self._step + INCOMPLETE_STEPS
        for rid in moves.fetch:
            # What the planner has counted on is not there; and nobody overtakes.
            if not all_went or not self.residency.order(by_rid[rid], self._reads):
                self.counters.no_room += 1
                break
        # What was there already is attached at once.
        self.counters.attached += len(self.residency.arrive())
        return moves.rotating

    def only_drafts_follow(self) -> Any:
        """The rest of this step reads no full KV: what leaves the device in the next one may be
        overwritten while the device still drafts. Returns an event that says so, or None."""
        self._reads = self.residency.mark_reads()
        return self._reads

    def paced(self, choice: Choice) -> Choice:
        """Of this step, which is shorter where the link would wait for its end."""
        if self._share is None or self._share >= choice.share:
            return choice
        return replace(choice, share=self._share)

    def check(
        self,
        reqs: Sequence[Any],
        states: Sequence[RequestState],
        committed: Sequence[int],
        plan: RoundPlan,
    ) -> None:
        """Assert that all that is about to be read is there; a step without work waits for the
        next arrival."""
        for i in (*plan.plain, *(i for i, _ in plan.verify)):
            if states[i].released:
                continue
            if not self.residency.is_full(reqs[i]):
                raise AssertionError(f"request {reqs[i].rid} is read while its row is empty")
            self.residency.note_read(reqs[i])
        working = {i for i, _ in plan.draft}
        idle = [i for i, s in enumerate(states) if not s.full and i not in working]
        for i, state in enumerate(states):
            # What it drafts from now on it drafts because it waits.
            if not state.full and (i not in working or state.drafted >= state.horizon):
                self.residency.await_verify(reqs[i], self._step)
        self._idle = len(idle)
        if self.watch is not None:
            tell(self.watch, reqs, states, committed, plan, self._short)
        if idle and not plan.plain and not plan.draft and not plan.verify:
            self.counters.attached += len(self.residency.arrive(IDLE_WAIT_S))

    def _runner(self, seat: Seat, state: RequestState, committed: int) -> Runner:
        bound = state.view is None
        # Under overlap scheduling SGLang takes a request with one token left out of the batch: the
        # step that is under way must yield it, so it cannot be one that waits.
        req = seat.req
        produced = committed + 1 - len(req.origin_input_ids)
        ends = req.sampling_params.max_new_tokens - produced <= 1
        stays = seat.unread or seat.stays_until > self._step
        movable = not bound and not ends and not stays and seat.place is Place.ATTACHED
        return Runner(
            seat.req.rid,
            seat.order,
            seat.path,
            seat.place,
            seat.since,
            movable,
            bound,
            seat.ready,
        )

    def _is_long(self, seat: Seat, state: RequestState) -> bool:
        """Whether what it has generated should leave the device as well."""
        kv = seat.req.kv
        private = kv.kv_committed_len - kv.cache_protected_len
        attached = seat.place is Place.ATTACHED
        return state.rotates and attached and private >= self.push_tokens

    @property
    def needs_views(self) -> bool:
        """Whether memory is short and rotation pays, as far as is known: everybody should be able
        to leave then."""
        return self.pays and (self._wanted > 0 or self._short)

    @property
    def free(self) -> int:
        """Tokens of the pool that are neither locked nor private."""
        return self.allocator.available_size() + self.residency.cache.evictable_size()

    # Asked by SGLang's scheduler, through the radix cache

    def poll(self) -> None:
        """Between steps, and while nothing runs: what has arrived need not stay locked."""
        if self.residency.ledger_stream is None and self.residency.rows.is_cuda:
            self.residency.ledger_stream = torch.cuda.current_stream()
        self.residency.settle_arrived()
        if self.room is not None:
            self.room.begin_pass()

    def may_admit(self, req: Any, remaining: int, growth: int) -> bool:
        """Whether one more request keeps everybody able to be attached.

        Args:
            remaining: tokens that SGLang has left to admit, its estimate of what the running
                requests will still take subtracted.
            growth: tokens that the request will take beside its prompt.
        """
        admitted = self._may_admit(req, remaining, growth)
        # While requests rotate the link is theirs.
        if admitted and self.prompts is not None and not self.pays and len(self.residency):
            reserve = load_reserve(self.residency, self.verify_width)
            admitted = not self.prompts.comes_first(req, remaining - growth - reserve)
        if admitted and self.room is not None:
            self.room.admit(req)
        return admitted

    def lets_in_alone(self, req: Any) -> bool:
        """While requests rotate room is made for whoever waits; and one whose prompt comes first
        has a prefill of its own, when it has come."""
        if self.pays:
            return True
        return self.prompts is not None and len(self.residency) > 0 and self.prompts.concerns(req)

    def _may_admit(self, req: Any, remaining: int, growth: int) -> bool:
        seats = self.residency.seats()
        if not seats:
            return True
        if self._idle >= MOST_IDLE:
            return False
        away = any(seat.place is not Place.ATTACHED for seat in seats)
        if not self.pays and away:
            return False  # the tails have pushed somebody out: room is not for newcomers
        prompt = len(req.full_untruncated_fill_ids)
        slack = 2 * self.verify_width * (len(seats) + 1)
        lockable = remaining + self._held(seats) - slack
        paths = [prompt, *(s.req.kv.cache_protected_len for s in seats)]
        if away or prompt - self._locked(req, seats) + growth > remaining:
            if self.room is not None and not self.room.holds(req):
                # Without a view it could never be detached: the others would share the rest.
                return False
            if not keeps_paths_together(paths, lockable, growth):
                return False
        return is_sound(paths, lockable - growth)

    def _locked(self, req: Any, seats: Sequence[Seat]) -> int:
        """Tokens of a waiting request's prompt that others keep on the device."""
        if req.session is not None or req.last_node is None:
            return 0
        kept = {part.node_id for seat in seats for part in seat.path}
        (infos,) = self.residency.cache.tree_core.collect_path_info([req.last_node])
        return sum(i.path_end - i.path_start for i in infos if i.node_id in kept)

    def was_refused(self, shortage: int) -> None:
        """The next request of the queue lacks so many tokens: they are freed if they can be."""
        if shortage > 0 and self._idle < MOST_IDLE:
            self._wanted = self.free + shortage

    def is_sound(self, reqs: Sequence[Any]) -> bool:
        """Whether each of these requests could still be attached; else SGLang is to retract."""
        seats = [s for s in map(self.residency.find, reqs) if s is not None]
        if len(reqs) <= 1 or all(seat.place is Place.ATTACHED for seat in seats):
            return True
        private = sum(r.kv.kv_allocated_len - r.kv.cache_protected_len for r in reqs)
        slack = self.verify_width * len(reqs) + self._prefill_rest
        paths = [seat.req.kv.cache_protected_len for seat in seats]
        return is_sound(paths, self.allocator.size - private - slack)

    @staticmethod
    def _held(seats: Sequence[Seat]) -> int:
        """Tokens on the paths that are locked, shared ones once."""
        nodes = {
            part.node_id: part.tokens
            for seat in seats
            if seat.place is not Place.DETACHED
            for part in seat.path
        }
        return sum(nodes.values())

    def numbers(self) -> OffloadNumbers:
        """What the metrics and the info endpoint show."""
        places = [seat.place for seat in self.residency.seats()]
        loader, integrity = self.residency.loader, self.residency.integrity
        copies = loader.counters
        return OffloadNumbers(
            active=loader.alive,
            attached=places.count(Place.ATTACHED),
            detached=places.count(Place.DETACHED),
            fetching=places.count(Place.FETCHING),
            waiting=self._idle if places else 0,
            detachments=self.counters.detached,
            attachments=self.counters.attached,
            fetches=copies.fetches,
            fetched_tokens=copies.tokens,
            fetched_bytes=copies.bytes,
            fetch_seconds=copies.seconds,
            failed=copies.failed,
            late=copies.late,
            cancelled=copies.cancelled,
            corrupt=copies.corrupt,
            corrupt_tokens=copies.corrupt_tokens,
            recomputed_tokens=0 if integrity is None else integrity.recomputed,
            prompts=0 if self.prompts is None else self.prompts.brought,
        )
