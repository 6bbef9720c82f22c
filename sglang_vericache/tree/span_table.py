"""Spans that nodes of the radix tree own."""

from __future__ import annotations

from sglang_vericache.metrics import SpanCounters
from sglang_vericache.pool.span import Span


class SpanTable:
    """Node id -> the span that ends where the node ends.

    A split leaves a node's id with its deeper part, so an entry stays right; ids are never reused.
    The table holds one reference to each span; a span that nobody else holds is idle and goes,
    least recently used first, when the draft pool needs room.
    """

    def __init__(self, counters: SpanCounters) -> None:
        self.counters = counters
        self._spans: dict[int, Span] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, node_id: int) -> bool:
        return node_id in self._spans

    def get(self, node_id: int) -> Span | None:
        return self._spans.get(node_id)

    def owners(self) -> list[int]:
        return list(self._spans)

    def own(self, node_id: int, span: Span, replace: bool = False) -> None:
        """Make ``node_id`` the owner of ``span``; one that it has already stays unless
        ``replace``."""
        if replace:
            self.drop(node_id)
        if node_id not in self._spans:
            span.acquire()
            self._spans[node_id] = span
            self.touch(span)

    def touch(self, span: Span) -> None:
        self._clock += 1
        span.last_used = self._clock

    def drop(self, node_id: int) -> None:
        """The node is gone: give up its span, if it has one."""
        span = self._spans.pop(node_id, None)
        if span is not None:
            self.counters.dropped += 1
            span.release()

    def clear(self) -> None:
        for node_id in self.owners():
            self.drop(node_id)

    def evict_for(self, slots: int) -> None:
        """Drop idle spans, least recently used first, until ``slots`` slots are free; none when
        that cannot be reached."""
        idle = [(n, span) for n, span in self._spans.items() if span.references == 1]
        if not idle:
            return
        allocator = idle[0][1].allocator
        if allocator.free_count + sum(span.rows for _, span in idle) < slots:
            return
        for node_id, _ in sorted(idle, key=lambda item: item[1].last_used):
            if allocator.free_count >= slots:
                return
            self.drop(node_id)
            self.counters.evicted += 1

    @property
    def rows(self) -> int:
        """Slots of all owned spans."""
        return sum(span.rows for span in self._spans.values())
