"""Whether the draft pool has room for the view of one more request, before it is prefilled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.tree.view_builder import ViewBuilder
from sglang_vericache.tree.view_plan import PathNode, plan_view

# A prefilled request has its view within so many decode steps, or gets none: under overlap
# scheduling its checkpoint is made only while the first one runs.
STEPS_TO_VIEW = 2


class DraftRoom:
    """Counts what views take, will take, and could be had by dropping idle spans.

    Args:
        states: of the running requests.
        path_of: a request's nodes of the radix tree, as far as it has any.
        budget_of: within which a request's view will be selected.
    """

    def __init__(
        self,
        views: ViewBuilder,
        states: Iterable[RequestState],
        path_of: Callable[[Any], Sequence[PathNode]],
        budget_of: Callable[[Any], Budget],
    ) -> None:
        self._views, self._states = views, states
        self._path_of, self._budget_of = path_of, budget_of
        # Rows by request id: of those admitted since the last prefill, and of those whose view is
        # still to be opened, with the decode steps that it may take.
        self._admitted: dict[str, int] = {}
        self._coming: dict[str, tuple[int, int]] = {}

    def begin_pass(self) -> None:
        """The scheduler looks through its waiting queue anew: who was admitted and then refused
        for another reason takes nothing."""
        self._admitted.clear()

    def holds(self, req: Any) -> bool:
        """Whether a view of this request would fit beside those that there are and will be."""
        return self.fits(self.rows_of(req), req.rid)

    def fits(self, rows: int, rid: str) -> bool:
        """Whether so many slots for this request would leave to the others what they will take."""
        free = self._views.pool.allocator.free_count
        wanted = rows + self._promised(rid)
        return wanted <= free or wanted <= free + self._views.spans.idle_rows

    def spare(self) -> int:
        """Free slots that are promised to nobody; idle spans are left to those who need them."""
        return self._views.pool.allocator.free_count - self._promised(None)

    def admit(self, req: Any) -> None:
        self._admitted[req.rid] = self.rows_of(req)

    def prefill(self, reqs: Sequence[Any]) -> None:
        """These are computed next; their views follow."""
        for req in reqs:
            self._coming[req.rid] = (self.rows_of(req), STEPS_TO_VIEW)
        self._admitted.clear()

    def step(self, chunks_follow: bool) -> None:
        """A decode step has opened the views that it could.

        Args:
            chunks_follow: a prompt is not computed to its end yet.
        """
        if chunks_follow or not self._coming:
            return
        opened = {state.rid for state in self._states if state.view is not None}
        self._coming = {
            rid: (rows, steps - 1)
            for rid, (rows, steps) in self._coming.items()
            if steps > 1 and rid not in opened
        }

    def rows_of(self, req: Any) -> int:
        """Slots that free and idle ones together lose to its view, whose tail has its full size.

        A view that keeps more of a short context than the ratio says does so only where that fits,
        so nobody has to wait for it.
        """
        end, views = len(req.full_untruncated_fill_ids), self._views
        if end < views.config.min_context_tokens:
            return 0
        # A session's later turns have a node that is none of the tree's.
        path = self._path_of(req) if req.session is None else ()
        plan = plan_view(path, end, self._budget_of(req).without_floor, views.scorer.scope)
        reused = [views.spans.get(node.node_id) for node in plan.reused]
        idle = sum(span.rows for span in reused if span is not None and span.references == 1)
        return sum(b.rows for b in plan.builds) + idle + views.config.tail_capacity

    def _promised(self, rid: str | None) -> int:
        """Slots that are free, or in idle spans, but not for another request."""
        full = self._views.config.tail_capacity
        views = [s.view for s in self._states if s.view is not None]
        tails = sum(max(full - (view.capacity - view.span_rows), 0) for view in views)
        coming = {other: rows for other, (rows, _) in self._coming.items()} | self._admitted
        if rid is not None:
            coming.pop(rid, None)
        return tails + sum(coming.values())
