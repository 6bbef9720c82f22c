"""The running requests, by id."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_vericache.metrics import DraftCounters, counters_of
from sglang_vericache.rounds.accounting import rows_of_plain_decoding
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.rounds.stagger import assign_group
from sglang_vericache.support import ENDED, draft_obstacle
from sglang_vericache.tree.view_builder import ViewBuilder
from sglang_vericache.tree.view_plan import PathNode


class RunningRequests:
    """States of the requests that decode; told by the radix cache when one ends.

    Args:
        groups: groups that take turns verifying.
        forget: told the id of each request that gives its row back.
    """

    def __init__(self, groups: int, views: ViewBuilder, forget: Callable[[str], object]) -> None:
        self.groups, self.views, self.forget = groups, views, forget
        self.total = DraftCounters()
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
        return [self._state(r, n) for r, n in zip(batch.reqs, committed, strict=True)]

    def get(self, rid: str) -> RequestState | None:
        return self._states.get(rid)

    def _state(self, req: Req, committed: int) -> RequestState:
        if req.kv.req_pool_idx is None:
            return self._ended(req, committed)
        state = self._states.get(req.rid)
        if state is None:
            group = assign_group((s.group for s in self), self.groups)
            obstacle, counters = draft_obstacle(req), counters_of(req)
            row = req.kv.req_pool_idx
            state = RequestState(req.rid, row, obstacle, group, counters, committed)
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
            req.rid, -1, ENDED, 0, counters_of(req), prompt_tokens=committed, released=True
        )

    # tree.cache.RequestListener

    def on_checkpoint(self, req: Req, path: tuple[PathNode, ...]) -> None:
        state = self._states.get(req.rid)
        if state is not None and state.view is not None:
            self.views.adopt(state.view, path)

    def on_release(self, req: Req) -> None:
        self.forget(req.rid)
        self._cut_overshoot(req)
        state = self._states.pop(req.rid, None)
        if state is not None:
            state.released = True
            if state.view is not None:
                self.views.close(state.view)

    def _cut_overshoot(self, req: Req) -> None:
        """A round is counted before its request's end is found in it."""
        kept = len(req.output_ids_through_stop)
        past_end = len(req.output_ids) - kept
        if past_end > 0:
            rows = rows_of_plain_decoding(len(req.origin_input_ids) + kept, past_end)
            counters_of(req).cut(past_end, rows)
            self.total.cut(past_end, rows)
