"""Building, folding and closing draft views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_vericache.compressors.base import Scorer
from sglang_vericache.compressors.budget import ALWAYS_KEPT_TOKENS, Budget
from sglang_vericache.compressors.scorers.keydiff import KeyDiff
from sglang_vericache.compressors.select import select_rows
from sglang_vericache.compressors.watch import Observation
from sglang_vericache.config import RECENT_TOKENS, VeriCacheConfig
from sglang_vericache.kernels.commit_rows import commit_rows
from sglang_vericache.kernels.gather_span import gather_span
from sglang_vericache.metrics import SpanCounters
from sglang_vericache.pool.draft_pool import DraftPool
from sglang_vericache.pool.rows import DraftRows
from sglang_vericache.pool.span import Span
from sglang_vericache.tree.full_kv import FullKV
from sglang_vericache.tree.path_scores import ScoredPath, path_scores
from sglang_vericache.tree.span_table import SpanTable
from sglang_vericache.tree.tail_fold import TailFold, fold_tails, groups_by_share
from sglang_vericache.tree.view import DraftView
from sglang_vericache.tree.view_plan import Build, PathNode, plan_view

# Tail slots are taken in blocks, so that most rounds take none.
TAIL_BLOCK = 32
# Observations of queries may take this part of the draft pool's memory beside it.
OBSERVATION_SHARE = 1 / 16


@dataclass(frozen=True)
class _Queries:
    """What a scorer knows of the queries and where it is from: the counter of SpanCounters, None
    when the scorer needs no queries."""

    observation: Observation | None
    counter: str | None

    @property
    def missing(self) -> bool:
        return self.observation is None and self.counter is not None

    def count(self, counters: SpanCounters) -> None:
        if self.counter is not None:
            setattr(counters, self.counter, getattr(counters, self.counter) + 1)


class ViewBuilder:
    """Turns full KV into spans and spans into the rows that draft attention reads."""

    def __init__(
        self,
        config: VeriCacheConfig,
        scorer: Scorer,
        pool: DraftPool,
        rows: DraftRows,
        spans: SpanTable,
        full: FullKV,
    ) -> None:
        self.config, self.scorer = config, scorer
        self.budget = Budget.of(config)
        self.pool, self.rows, self.spans, self.full = pool, rows, spans, full
        self.counters = spans.counters
        spans.observation_limit_bytes = int(pool.slots * pool.storage.row_bytes * OBSERVATION_SHARE)
        self._without_queries = KeyDiff()
        # The queries of generated tokens are not observed.
        self._of_tails = scorer if scorer.watch is None else self._without_queries

    def budget_of(self, keep_ratio: float | None) -> Budget:
        """Of a request that asks for ``keep_ratio``: up to what the server's own budget keeps of
        the longest context, for which the rows have room. The server's when None."""
        if keep_ratio is None:
            return self.budget
        return Budget(keep_ratio, None, most_rows=self.most_rows)

    @property
    def most_rows(self) -> int:
        """That a budget may ask for: more than these spans a row does not hold."""
        return max(self.rows.width - self.config.tail_capacity - ALWAYS_KEPT_TOKENS, 1)

    def open(
        self,
        row: int,
        path: Sequence[PathNode],
        end: int,
        computed: Observation | None,
        budget: Budget | None = None,
    ) -> DraftView | None:
        """Draft view over the committed tokens [0, end), or None when the draft pool is full.

        Args:
            row: the request's row in the main request table.
            path: the request's nodes of the radix tree.
            computed: what was observed of the queries that this request computed.
            budget: of this request; the server's when None.
        """
        plan = plan_view(path, end, budget or self.budget, self.scorer.scope)
        view = DraftView(row, plan.budget)
        for node in plan.reused:
            self._append(view, self.spans.get(node.node_id))
            self.counters.reused += 1
        queries = self._choose_queries(computed, self._stored(path, end), end)
        for build in plan.builds:
            span = self._build(row, build, end, queries, plan.budget)
            if span is None:
                self._release(view)
                self.counters.no_memory += 1
                return None
            self._append(view, span)
            if build.node_id is not None:
                # The plan builds where a span is only when that one did not fit.
                self.spans.own(build.node_id, span, replace=True)
        # From the leaf: a prefix outlives what continues it, which is useless without it.
        for span in reversed(view.spans):
            self.spans.touch(span)
        self._write_row(view)
        return view

    def fold(self, views: Sequence[tuple[DraftView, int]]) -> list[bool]:
        """Compress the older parts of long tails; False for a view that found no memory for it.

        At least the most recent tokens stay in a tail. Where the row limit of a path leaves no
        room for another span, the whole path is selected anew.

        Args:
            views: (view, committed tokens of its request), with more than RECENT_TOKENS in the
                tail. Tails are folded together, so each by as much as the shortest allows.
        """
        tokens = min(committed - RECENT_TOKENS - view.tail_start for view, committed in views)
        done: dict[DraftView, bool] = {}
        for share, group in groups_by_share([view for view, _ in views], tokens):
            done |= self._fold_together(group, tokens, share)
        for view, committed in views:
            if view not in done:
                done[view] = self._select_anew(view, committed - RECENT_TOKENS)
        self.counters.no_memory += list(done.values()).count(False)
        return [done[view] for view, _ in views]

    def _fold_together(
        self, views: Sequence[DraftView], tokens: int, rows: int
    ) -> dict[DraftView, bool]:
        """``rows`` of the first ``tokens`` of each tail; False for a view without memory for it."""
        if rows == tokens:
            return {view: self._keep_whole(view, tokens) for view in views}
        folds: list[TailFold] = []
        for view in views:
            slots = self._take(rows)
            if slots is not None:
                tail = torch.cat(view.tail)
                folds.append(TailFold(view, tail[:tokens], tail[tokens:], slots))
        fold_tails(self.pool.storage, self._of_tails, self.full.scaling, folds)
        for fold in folds:
            start, end = fold.view.tail_start, fold.view.tail_start + tokens
            scope, allocator = self._of_tails.scope, self.pool.allocator
            span = Span(start, end, fold.targets, scope, allocator, fold.view.budget)
            self._replace_tail(fold.view, fold.view.spans, span, fold.source, fold.rest)
            self.counters.folded += 1
        folded = {fold.view for fold in folds}
        return {view: view in folded for view in views}

    def _keep_whole(self, view: DraftView, tokens: int) -> bool:
        """The first slots of the tail become a span as they are, in the place of the row that
        they have."""
        tail, start, scope = torch.cat(view.tail), view.tail_start, self._of_tails.scope
        span = Span(start, start + tokens, tail[:tokens], scope, self.pool.allocator, view.budget)
        view.set(view.spans, [tail[tokens:]])
        self._append(view, span)
        self.counters.folded += 1
        return True

    def _select_anew(self, view: DraftView, end: int) -> bool:
        """One span for the whole path up to ``end``; False when there is no memory for it."""
        whole = Build(0, end, view.budget.path_rows(end), None)
        known = next((s.observation for s in view.spans[::-1] if s.observation), None)
        queries = self._choose_queries(None, known, end)
        span = self._build(view.row, whole, end, queries, view.budget)
        if span is None:
            return False
        tail, covered = torch.cat(view.tail), end - view.tail_start
        self._replace_tail(view, [], span, tail[:covered], tail[covered:])
        return True

    def _replace_tail(
        self,
        view: DraftView,
        kept: Sequence[Span],
        span: Span,
        covered: torch.Tensor,
        rest: torch.Tensor,
    ) -> None:
        """``span`` takes the place of the tail slots ``covered`` and of the spans not ``kept``."""
        for old in view.spans:
            if old not in kept:
                old.release()
        self.pool.allocator.give(covered)
        view.set(kept, [rest])
        self._append(view, span)
        self._write_row(view)

    def reserve(self, view: DraftView, length: int) -> bool:
        """Give the row slots for ``length`` entries; False when the draft pool is full."""
        missing, room = length - view.capacity, self.rows.width - view.capacity
        if missing <= 0:
            return True
        if missing > room:
            raise AssertionError(f"a draft row of {self.rows.width} slots cannot grow to {length}")
        # Nothing is evicted for the spare slots of a block.
        slots = self.pool.allocator.take(max(missing, min(TAIL_BLOCK, room)))
        slots = slots if slots is not None else self._take(missing)
        if slots is None:
            self.counters.no_memory += 1
            return False
        self.rows.write(view.row, view.capacity, slots)
        view.append_tail(slots)
        return True

    def fill_tails(self, views: Sequence[tuple[DraftView, int]]) -> None:
        """Copy the exact KV of the tokens after the spans into the tails.

        Args:
            views: (view, committed tokens of its request).

        Precondition: `reserve` gave each tail room for them.
        """
        behind = [(view, committed) for view, committed in views if committed > view.tail_start]
        if not behind:
            return
        sources = [self.full.slots(view.row, view.tail_start, end) for view, end in behind]
        targets = [torch.cat(view.tail)[: end - view.tail_start] for view, end in behind]
        commit_rows(
            self.full.keys,
            self.full.values,
            torch.cat(sources),
            self.pool.storage,
            torch.cat(targets),
        )

    def adopt(self, view: DraftView, path: Sequence[PathNode]) -> None:
        """Let nodes that have come into being own the private spans that end where they end."""
        ends = {node.end: node.node_id for node in path}
        for span in view.spans:
            if span.end in ends:
                self.spans.own(ends[span.end], span)

    def close(self, view: DraftView) -> None:
        """Give back the tail and the view's references to its spans; on the host only, since a
        forward may still be reading them."""
        for slots in view.tail:
            self.pool.allocator.give(slots)
        view.set(view.spans, ())
        self._release(view)

    def _append(self, view: DraftView, span: Span) -> None:
        span.acquire()
        view.set((*view.spans, span), view.tail)

    def _release(self, view: DraftView) -> None:
        for span in view.spans:
            span.release()
        view.set((), view.tail)

    def _write_row(self, view: DraftView) -> None:
        slots = torch.cat([*(span.slots for span in view.spans), *view.tail])
        self.rows.write(view.row, 0, slots)
        self.rows.set_offset(view.row, view.offset)

    def _take(self, count: int) -> torch.Tensor | None:
        slots = self.pool.allocator.take(count)
        if slots is None:
            self.spans.evict_for(count)
            slots = self.pool.allocator.take(count)
        return slots

    def _stored(self, path: Sequence[PathNode], end: int) -> Observation | None:
        """What the deepest node of the path that knows anything knows of the queries."""
        for node in reversed(path):
            found = self.spans.observation(node.node_id)
            if found is not None and found.end <= end:
                return found
        return None

    def remember(self, path: Sequence[PathNode], computed: Observation) -> None:
        """Keep the queries through which a prompt would be scored, with the node that they end in.

        What is kept with the nodes before it is taken up: alone, the few tokens of a next turn
        would stand in its way.
        """
        watch = self.scorer.watch
        ends = (depth for depth, node in enumerate(path) if node.end >= computed.end)
        depth = next(ends, None)
        if watch is None or depth is None:
            return
        holder = path[depth]
        known = self._stored(path[: depth + 1], holder.end)
        choice = watch.choose(computed, known, holder.end)
        if choice.observation is not None:
            self.spans.remember(holder.node_id, choice.observation)

    def _choose_queries(
        self, computed: Observation | None, stored: Observation | None, end: int
    ) -> _Queries:
        """The queries through which a scorer looks at a path ending at ``end``."""
        watch = self.scorer.watch
        if watch is None:
            return _Queries(None, None)
        choice = watch.choose(computed, stored, end)
        if choice.observation is None:
            return _Queries(None, "scored_without")
        counter = "scored_with_stored" if choice.borrowed else "scored_with_computed"
        return _Queries(choice.observation, counter)

    def _build(
        self, row: int, build: Build, path_end: int, queries: _Queries, budget: Budget
    ) -> Span | None:
        slots = self._take(build.rows)
        if slots is None:
            return None
        scorer = self._without_queries if queries.missing else self.scorer
        first = 0 if scorer.scope == "path" else build.start
        source = self.full.slots(row, first, build.end)
        path = ScoredPath(self.full, source, first, path_end, queries.observation)
        scores = path_scores(scorer, path)
        picks = select_rows(scores[..., build.start - first :], build.rows, build.start, path_end)
        gather_span(
            self.full.keys,
            self.full.values,
            source[build.start - first :],
            picks,
            self.pool.storage,
            slots,
        )
        self.counters.built += 1
        queries.count(self.counters)
        kept = queries.observation if build.end == path_end else None
        allocator = self.pool.allocator
        return Span(build.start, build.end, slots, scorer.scope, allocator, budget, kept)
