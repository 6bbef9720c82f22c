"""SGLang's scheduler as rotation sees it: admits, retracts, decodes, and grants tokens."""

from __future__ import annotations

import random
from types import SimpleNamespace

from tree_world import Request, World

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.metrics import SpanCounters
from sglang_vericache.pool.allocator import SlotAllocator
from sglang_vericache.rounds.agreement import Agreement
from sglang_vericache.rounds.draft_room import DraftRoom
from sglang_vericache.rounds.held_prompts import HeldPrompts
from sglang_vericache.rounds.policy import RoundPlan
from sglang_vericache.rounds.prompt_fetch import PromptFetch
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.rounds.rotation import Rotation
from sglang_vericache.tree.span_table import SpanTable

WIDTH = 5


class Drafts:
    """The draft pool by numbers: what ViewBuilder has of it, and the states of who drafts."""

    def __init__(self, slots: int) -> None:
        self.config = VeriCacheConfig(
            min_context_tokens=8,
            horizon=WIDTH - 1,
            fold_tail_tokens=70,
            draft_ahead="off",
            keep_min_tokens=0,
        )
        self.budget = Budget.of(self.config)
        self.pool = SimpleNamespace(allocator=SlotAllocator(slots, "cpu"))
        self.spans, self.scorer = SpanTable(SpanCounters()), SimpleNamespace(scope="path")
        self.states: list[SimpleNamespace] = []

    def open(self, states, reqs) -> None:
        """Views for those that have none, as far as there is room, and what others' ends freed."""
        running = {req.rid: req for req in reqs}
        for state in self.states:
            if state.rid not in running and state.view is not None:
                self.pool.allocator.give(state.view.slots)
        self.states[:] = [s for s in self.states if s.rid in running]
        known = {s.rid for s in self.states}
        for state in states:
            if state.rid in known:
                continue
            rows = self.budget.path_rows(len(running[state.rid].text))
            slots = self.pool.allocator.take(rows + self.config.tail_capacity)
            self.states.append(state)
            if slots is not None:
                state.view = SimpleNamespace(slots=slots, capacity=len(slots), span_rows=rows)


class State(SimpleNamespace):
    """What `Rotation` reads of a RequestState."""

    steady = RequestState.steady


class Scheduler:
    """
    Attributes:
        most_together: requests that ran at a time.
        done: texts at their end by the text at the start.
    """

    def __init__(
        self,
        world: World,
        push_tokens: int = 40,
        plain: float = 0.0,
        watch=None,
        drafts=None,
        ahead: bool = False,
        least_prompt: int | None = None,
        held: HeldPrompts | None = None,
    ) -> None:
        self.world, self.drafts = world, drafts or Drafts(1 << 20)
        self.room = DraftRoom(
            self.drafts, self.drafts.states, world.cache.path_of, lambda req: self.drafts.budget
        )
        prompts = None
        if least_prompt is not None:
            prompts = PromptFetch(world.residency, least_prompt, held=held)
        self.rotation = Rotation(
            world.residency, world.allocator, WIDTH, push_tokens, watch, self.room, prompts
        )
        world.cache.rotation, world.cache.held = self.rotation, held
        self.waiting: list[tuple[list[int], int]] = []
        self.left: dict[str, int] = {}
        self.drafting: set[str] = set()
        self.states: dict[str, State] = {}
        self.bound_beside_rotating = 0
        self.rng = random.Random(1)
        self.plain, self.ahead = plain, ahead
        self.most_together = self.retracted = self.steps = 0
        self.done: list[list[int]] = []

    def run(self, most_steps: int, on_step=lambda step: None) -> None:
        while self.waiting or self.world.requests:
            self.steps += 1
            assert self.steps < most_steps, (
                f"{len(self.world.requests)} running, {len(self.waiting)} waiting: "
                f"{self.rotation.numbers()}"
            )
            on_step(self.steps)
            self.world.events()
            self.admit()
            self.retract()
            self.decode()
            self.world.check_ledger()
            self.most_together = max(self.most_together, len(self.world.requests))

    def remaining(self) -> int:
        """As SGLang's scheduler counts it: less what the running requests will still take."""
        return self.rotation.free - sum(self.left[r.rid] + WIDTH for r in self.world.requests)

    def admit(self) -> None:
        first = True
        while self.waiting:
            text, output = self.waiting[0]
            remaining = self.remaining()
            candidate = Request(str(len(self.waiting)), text)
            if self.rotation.prompts is not None:
                self.world.match(candidate)
            waiting = len(self.waiting) if first else 0
            if not self.world.cache.may_admit(candidate, remaining, output, waiting):
                self.look_on()
                return
            needed = len(text) + output + 1
            if needed > remaining:
                assert self.world.cache.on_refusal(needed - remaining)
                return
            req = self.world.admit(text)
            if req is None:
                return  # the prefill was put off
            self.rotation.before_extend(SimpleNamespace(chunked_req=None, reqs=[req]))
            self.waiting.pop(0)
            first = False
            self.left[req.rid] = output
            req.sampling_params.max_new_tokens = output
            self.states[req.rid] = State(
                view=None,
                drafted=0,
                full=True,
                rotates=False,
                released=False,
                rid=req.rid,
                horizon=WIDTH - 1,
                deepest=WIDTH - 1,
                agreement=Agreement(),
            )
            if self.rng.random() >= self.plain:
                self.drafting.add(req.rid)

    def look_on(self) -> None:
        """As SGLang's loop does, which asks about the next one where it is told to go on."""
        for behind, (text, output) in enumerate(self.waiting[1:], 1):
            if not self.world.cache.looks_on():
                return
            candidate = Request(str(len(self.waiting) - behind), text)
            self.world.match(candidate)
            waiting = len(self.waiting)
            admitted = self.world.cache.may_admit(candidate, self.remaining(), output, waiting)
            assert not admitted, "nobody overtakes"

    def retract(self) -> None:
        while self.world.requests:
            fits = self.rotation.free >= WIDTH * len(self.world.requests)
            if fits and self.world.cache.may_decode(self.world.requests):
                return
            assert len(self.world.requests) > 1, "even the last one does not fit"
            self.retracted += 1
            self.give_up(self.world.requests[-1])

    def give_up(self, req) -> None:
        self.waiting.insert(0, (req.text, self.left.pop(req.rid)))
        self.world.end(req, checkpoint=False)

    def decode(self) -> None:
        reqs = list(self.world.requests)
        if not reqs:
            return
        states = [self.states[r.rid] for r in reqs]
        self.drafts.open([s for s in states if s.rid in self.drafting], reqs)
        away = any(not self.world.residency.is_full(r) for r in reqs)
        self.bound_beside_rotating += away and any(
            s.view is None and s.rid in self.drafting for s in states
        )
        self.rotation.step(reqs, states, [len(r.text) - 1 for r in reqs], views_built=False)
        plain = [i for i, s in enumerate(states) if s.full and s.view is None]
        verify = [(i, WIDTH - 1) for i, s in enumerate(states) if s.full and s.view is not None]
        draft = [
            (i, WIDTH - 1 - s.drafted)
            for i, s in enumerate(states)
            if s.view is not None and s.drafted < WIDTH - 1
        ]
        plan = RoundPlan(tuple(plain), tuple(draft), tuple(verify))
        self.rotation.check(reqs, states, [len(r.text) - 1 for r in reqs], plan)
        for i, count in draft:
            states[i].drafted += count
        at_rest = all(s.steady for s in states)
        for req, state in zip(reqs, states, strict=True):
            assert state.full or self.left[req.rid] > 1, "SGLang would lose its last token"
        for i in (*plain, *(i for i, _ in verify)):
            count = 1 if i in plain else self.rng.randint(1, WIDTH)
            count = min(count, self.left[reqs[i].rid])
            assert self.world.generate(reqs[i], count), "no room for a tail"
            states[i].drafted = WIDTH - 1 if self.ahead and at_rest and i not in plain else 0
            self.left[reqs[i].rid] -= count
        for req in reqs:
            if self.left[req.rid] == 0:
                self.done.append(req.text)
                self.world.end(req, checkpoint=True)


def texts(seed: int, count: int, shortest: int, longest: int, shared: float) -> list[list[int]]:
    rng = random.Random(seed)
    prefixes = [[rng.randrange(50) for _ in range(shortest)] for _ in range(3)]
    found = []
    for n in range(count):
        head = prefixes[rng.randrange(3)] if rng.random() < shared else []
        rest = rng.randint(shortest, longest) - len(head)
        found.append([*head, n % 50, *(rng.randrange(50) for _ in range(max(rest, 4)))])
    return found
