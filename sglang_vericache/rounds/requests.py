"""The running requests, by id."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.compressors.watch import Observation
from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.metrics import DraftCounters, counters_of
from sglang_vericache.request_options import options_of
from sglang_vericache.rounds.accounting import rows_of_steps
from sglang_vericache.rounds.admission import Admission
from sglang_vericache.rounds.agreement import Agreement, SharedAgreement
from sglang_vericache.rounds.batch import Batch
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.rounds.stagger import assign_group
from sglang_vericache.support import ENDED, draft_obstacle, is_token_by_token
from sglang_vericache.tree.view_builder import ViewBuilder
from sglang_vericache.tree.view_plan import PathNode


def remaining_of(batch: ScheduleBatch, committed: Sequence[int]) -> list[int]:
    """Tokens that each request may still make."""
    # Not from output_ids, which trail by a step under overlap scheduling.
    return [
        req.sampling_params.max_new_tokens - (length + 1 - len(req.origin_input_ids))
        for req, length in zip(batch.reqs, committed, strict=True)
    ]


class RunningRequests:
    """States of the requests that decode; told by the radix cache when one ends.

    Args:
        observed: what a prefill saw of a request's queries, by its id.
        forget: told the id of each request that gives its row back.
        admission: told when one does.
    """

    def __init__(
        self,
        config: VeriCacheConfig,
        views: ViewBuilder,
        observed: Callable[[str], Observation | None],
        forget: Callable[[str], object],
        admission: Admission | None = None,
    ) -> None:
        self.config, self.views, self.observed, self.forget = config, views, observed, forget
        self.admission = admission
        self.total = DraftCounters()
        self.agreement = SharedAgreement()
        self._states: dict[str, RequestState] = {}

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._states.values())

    def __len__(self) -> int:
        return len(self._states)

    def of(self, batch: ScheduleBatch, committed: Sequence[int]) -> list[RequestState]:
        """States in the order of the batch, new ones for requests in their first decode step.

        Args:
            committed: tokens of each request whose KV is computed.
        """
        found = []
        for req, length in zip(batch.reqs, committed, strict=True):
            state = self._states.get(req.rid)
            if state is None or state.row != req.kv.req_pool_idx:
                state = self._state(req, length)
            found.append(state)
        return found

    def describe(
        self,
        states: Sequence[RequestState],
        committed: Sequence[int],
        remaining: Sequence[int],
        may_draft: Callable[[RequestState, int], bool] | None,
    ) -> Batch:
        """For the choice of a horizon.

        Args:
            may_draft: None while drafting is switched off.
        """
        drafters = [
            i
            for i, state in enumerate(states)
            if may_draft is not None and may_draft(state, committed[i])
        ]
        shown = [states[i].agreement.value for i in drafters if states[i].agreement.shown]
        return Batch(
            contexts=committed,
            remaining=remaining,
            drafters=drafters,
            agreements=np.array(shown),
            others=np.array(self.agreement.values()),
            without_view=sum(states[i].view is None for i in drafters),
            rotating=not all(state.steady for state in states),
            token_by_token=any(state.token_by_token for state in states),
        )

    def get(self, rid: str) -> RequestState | None:
        return self._states.get(rid)

    def budget_of(self, req: Req) -> Budget:
        """For the draft view of a request that may still be waiting."""
        return self.views.budget_of(options_of(req, self.config).keep_ratio)

    def _state(self, req: Req, committed: int) -> RequestState:
        if req.kv.req_pool_idx is None:
            return self._ended(req, committed)
        state = self._states.get(req.rid)
        if state is None:
            options = options_of(req, self.config)
            state = RequestState(
                rid=req.rid,
                row=req.kv.req_pool_idx,
                obstacle=draft_obstacle(req, options),
                token_by_token=is_token_by_token(req),
                group=assign_group((s.group for s in self), self.config.stagger_groups),
                counters=counters_of(req),
                prompt_tokens=committed,
                horizon=options.horizon or self.config.horizon,
                deepest=options.horizon or self.config.deepest,
                budget=self.views.budget_of(options.keep_ratio),
                agreement=Agreement(self.agreement),
                may_grow=self.config.views_grow and options.keep_ratio is None,
            )
            self._states[req.rid] = state
        elif state.row != req.kv.req_pool_idx:
            raise AssertionError(
                f"request {req.rid} moved from row {state.row} to {req.kv.req_pool_idx} "
                "without giving its row back"
            )
        return state

    def _ended(self, req: Req, committed: int) -> RequestState:
        """Overlap scheduling with grammars processes the last step between choosing a batch and
        running it: a request that ended there is run once more, for nobody."""
        return RequestState(
            rid=req.rid,
            row=-1,
            obstacle=ENDED,
            group=0,
            counters=counters_of(req),
            prompt_tokens=committed,
            horizon=self.config.horizon,
            deepest=self.config.deepest,
            budget=self.views.budget,
            released=True,
        )

    # tree.cache.RequestListener

    def on_checkpoint(self, req: Req, path: tuple[PathNode, ...]) -> None:
        state = self._states.get(req.rid)
        if state is not None and state.view is not None:
            self.views.adopt(state.view, path)
            return
        # Who never drafts, because one token is asked for, leaves it to those with its prefix.
        observation = self.observed(req.rid)
        if observation is not None and path and path[-1].end >= len(req.origin_input_ids):
            self.views.remember(path, observation)

    def on_release(self, req: Req) -> None:
        self.forget(req.rid)
        self._cut_overshoot(req)
        state = self._states.pop(req.rid, None)
        if state is not None:
            state.released = True
            if self.admission is not None:
                self.admission.ended()
            if state.view is not None:
                self.views.close(state.view)

    def _cut_overshoot(self, req: Req) -> None:
        """A round, or several plain steps, are counted before a request's end is found in them."""
        kept = len(req.output_ids_through_stop)
        past_end = len(req.output_ids) - kept
        state = self._states.get(req.rid)
        if past_end > 0 and state is not None:
            rows = rows_of_steps(len(req.origin_input_ids) + kept, past_end)
            for counters in (counters_of(req), self.total):
                counters.cut(past_end, rows, state.last_yield, state.last_reason)
