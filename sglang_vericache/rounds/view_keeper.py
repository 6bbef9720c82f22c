"""Opens, folds, extends and closes the draft views of the running requests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.config import RECENT_TOKENS, VeriCacheConfig
from sglang_vericache.phase_clock import PhaseClock
from sglang_vericache.rounds.controller import PLAIN
from sglang_vericache.rounds.draft_room import DraftRoom
from sglang_vericache.rounds.pace import Choice, Pace
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.rounds.view_growth import LEFT_FREE, Failing, choose, drafts_fail, larger
from sglang_vericache.support import (
    AWAITS_CHECKPOINT,
    AWAITS_FULL_KV,
    AWAITS_VIEW,
    NO_DRAFT_MEMORY,
    PLAIN_IS_FASTER,
    SHORT_CONTEXT,
    SWITCHED_OFF,
)
from sglang_vericache.tree.view import DraftView
from sglang_vericache.tree.view_builder import ViewBuilder


class ViewKeeper:
    """Gives each request of a step its draft view, or says why the step decodes it plainly.

    Args:
        tree: the radix cache, for the nodes of a request's path.
        capture: what was seen of a prefill's queries.
        room: what the draft pool can spare.

    Attributes:
        built: this step has read full KV, to open views or to select a path anew.
    """

    def __init__(
        self,
        config: VeriCacheConfig,
        views: ViewBuilder,
        tree: Any,
        capture: Any,
        pace: Pace,
        phases: PhaseClock,
        room: DraftRoom,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config, self.views, self.tree, self.capture = config, views, tree, capture
        self.pace, self.phases, self.room = pace, phases, room
        self._opened: list[tuple[DraftView, int]] = []  # in this step, with committed tokens
        self._clock, self._open_until = clock, math.inf
        self.built = False

    def prepare(
        self,
        reqs: Sequence[Any],
        states: Sequence[RequestState],
        committed: Sequence[int],
        remaining: Sequence[int],
        choice: Choice | None,
        all_need_views: bool = False,
        prompts_wait: bool = False,
    ) -> list[str | None]:
        """For each request None when its view is ready to draft, else why it is not.

        Args:
            committed: tokens of each request whose KV is computed.
            remaining: tokens that each may still make.
            choice: None while drafting is switched off.
            all_need_views: who is decoded plainly, because that is faster, has a view all the
                same: without one its full KV could not leave the device.
            prompts_wait: views are opened for as long as a step may last, and the others' later:
                those of hundreds take most of a second, in which no prompt is begun.
        """
        self.built = False
        limited = prompts_wait and self.pace.adapts
        self._open_until = self._clock() + self.config.max_step_seconds if limited else math.inf
        self._grow_failing(states, committed, remaining, choice)
        self._fold_long_tails(states, committed)
        self._opened = []
        self.phases.collect()
        may_open = choice is not None and (choice.horizon != PLAIN or all_need_views)
        with self._timed(may_open and any(state.view is None for state in states)):
            reasons = [
                self._prepare(req, state, length, choice, all_need_views)
                for req, state, length in zip(reqs, states, committed, strict=True)
            ]
            if self._opened:
                with self.phases("build"):
                    self.views.fill_tails(self._opened)
        return reasons

    @contextmanager
    def _timed(self, opens: bool) -> Iterator[None]:
        """The pace is told what opening views took: the steps around it lie between prefills."""
        if not (opens and self.pace.adapts):
            yield
            return
        tokens: list[int] = []
        with self.phases.measured(lambda seconds: self.pace.built(seconds, sum(tokens))):
            yield
            tokens += [committed for _, committed in self._opened]

    def may_draft(self, state: RequestState, committed: int) -> bool:
        """Whether it drafts if drafting is chosen, as far as can be told before."""
        if state.obstacle is not None:
            return False
        if state.view is not None:
            return True
        refused = state.memory_generation == self.views.pool.allocator.generation
        return state.full and not refused and committed >= self.config.min_context_tokens

    def close(self, state: RequestState) -> None:
        if state.view is not None:
            self.views.close(state.view)
        state.view, state.drafted = None, 0

    def _grow_failing(
        self,
        states: Sequence[RequestState],
        committed: Sequence[int],
        remaining: Sequence[int],
        choice: Choice | None,
    ) -> None:
        """Close the views that are to be opened again, in this step, within a larger budget."""
        if not self.config.views_grow:
            return
        failing: list[Failing] = []
        budgets: dict[int, Budget] = {}
        drafting = choice is not None and choice.horizon != PLAIN
        for i, (state, length, left) in enumerate(zip(states, committed, remaining, strict=True)):
            state.grows_next = False
            if not (drafting and state.may_grow and state.full and state.view is not None):
                continue
            if not drafts_fail(state.agreement, left):
                continue
            budget = larger(state.view.budget, state.view.tail_start, self.views.most_rows)
            if budget is not None:
                budgets[i], rows = budget, budget.path_rows(length)
                value, ready = state.agreement.value, state.drafted == 0
                failing.append(Failing(i, value, length, rows, ready))
        if not failing:
            return
        pool = self.views.pool.allocator
        for i in choose(failing, self.room.spare() - int(LEFT_FREE * pool.total)):
            if states[i].drafted:
                # Drafting ahead, a request has always drafted something: the planner lets it be.
                states[i].grows_next = True
                continue
            self.close(states[i])
            states[i].grown = budgets[i]
            states[i].agreement.view_grew()
            self.views.counters.views_grown += 1

    def _fold_long_tails(self, states: Sequence[RequestState], committed: Sequence[int]) -> None:
        """Where one is too long, those go with it that are half as much longer than must stay: it
        is launching that a fold costs, and many requests would have one in every step. Not where
        the number of tokens is fixed: there a whole path is selected anew, each by itself."""
        limit = self.config.fold_tail_tokens
        least, selected = (RECENT_TOKENS + limit) // 2, self.views.counters.built
        while True:
            tails = [
                (state, state.view, length, state.view.tail_tokens(length))
                for state, length in zip(states, committed, strict=True)
                if state.view is not None and state.full
            ]
            if not any(tail > limit for *_, tail in tails):
                break
            long = [
                (state, view, length)
                for state, view, length, tail in tails
                if tail > (limit if view.budget.keep_ratio is None else least)
            ]
            with self.phases("build"):
                folded = self.views.fold([(view, length) for _, view, length in long])
            for (state, *_), done in zip(long, folded, strict=True):
                if not done:
                    self._without_memory(state)
            # All are folded by what the shortest allows: for the longest that may be too little.
            least = limit
        self.built = self.views.counters.built > selected

    def _prepare(
        self,
        req: Any,
        state: RequestState,
        committed: int,
        choice: Choice | None,
        needs_view: bool,
    ) -> str | None:
        if state.obstacle is not None:
            return state.obstacle
        if choice is None:
            return SWITCHED_OFF
        plain = choice.horizon == PLAIN
        if state.rotates and state.view is not None:
            plain = False  # what drafting costs is not what limits it
        if plain and choice.lasting and not needs_view:
            self.close(state)
        if state.view is None and not state.full:
            return AWAITS_FULL_KV
        if state.view is None:
            if plain and not needs_view:
                return PLAIN_IS_FASTER
            if self._opened and self._clock() >= self._open_until:
                return AWAITS_VIEW
            reason = self._open(req, state, committed)
            return PLAIN_IS_FASTER if plain and reason is None else reason
        if not self._reserve(state.view, committed):
            return self._without_memory(state)
        return PLAIN_IS_FASTER if plain else None

    def _open(self, req: Any, state: RequestState, committed: int) -> str | None:
        if committed < self.config.min_context_tokens:
            return SHORT_CONTEXT
        if state.memory_generation == self.views.pool.allocator.generation:
            return NO_DRAFT_MEMORY
        if not self.tree.holds_prompt(req, state.prompt_tokens):
            # Overlap scheduling: the prefill's result is processed while this step runs.
            return AWAITS_CHECKPOINT
        if not req.output_ids:
            return AWAITS_CHECKPOINT  # it would change nothing, but the first token would wait
        # A span over the prompt can be shared; what was generated since goes to the tail. A larger
        # view takes the place of the one that the prompt's node owns, as long as the tail is short.
        most = self.config.fold_tail_tokens if state.grown is not None else RECENT_TOKENS
        fresh = committed - state.prompt_tokens <= most
        shareable = fresh and state.prompt_tokens >= self.config.min_context_tokens
        end = state.prompt_tokens if shareable else committed
        self.pace.unusual()
        self.built = True
        path, seen = self.tree.path_of(req), self.capture.observation(req.rid)
        with self.phases("build"):
            state.view = self.views.open(state.row, path, end, seen, self._budget(state, end))
        if state.view is None or not self._reserve(state.view, committed):
            return self._without_memory(state)
        self.capture.forget(req.rid)
        self._opened.append((state.view, committed))
        return None

    def _budget(self, state: RequestState, end: int) -> Budget:
        """The request's own, unless what it keeps beyond the ratio would be missing elsewhere."""
        smallest = state.budget.without_floor
        for budget in (state.grown, state.budget):
            rows = 0 if budget is None else budget.path_rows(end)
            if budget is None or rows == smallest.path_rows(end):
                continue  # whether there is room looks at all running requests
            if self.room.fits(rows + self.config.tail_capacity, state.rid):
                return budget
        return smallest

    def _reserve(self, view: DraftView, committed: int) -> bool:
        length = view.length(committed) + self.config.draft_reserve
        return length <= view.capacity or self.views.reserve(view, length)

    def _without_memory(self, state: RequestState) -> str:
        self.close(state)
        state.memory_generation = self.views.pool.allocator.generation
        return NO_DRAFT_MEMORY
