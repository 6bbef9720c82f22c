"""Spans that nodes of the radix tree own."""

from __future__ import annotations

from sglang_vericache.compressors.watch import Observation
from sglang_vericache.metrics import SpanCounters
from sglang_vericache.pool.span import Span


class SpanTable:
    """Node id -> the span that ends where the node ends.

    A split leaves a node's id with its deeper part, so an entry stays right; ids are never reused.
    The table holds one reference to each span; a span that nobody else holds is idle and goes,
    least recently used first, when the draft pool needs room.

    What was observed of the queries up to a node outlives its span, so that the next selection
    there need not do without; when all of it takes more than ``observation_limit_bytes``, the
    least recently used goes.
    """

    def __init__(self, counters: SpanCounters) -> None:
        self.counters = counters
        self.observation_limit_bytes = 0
        self._spans: dict[int, Span] = {}
        self._observations: dict[int, Observation] = {}
        # Device memory of them; one that nodes share is counted for each.
        self.observation_bytes = 0
        self._clock = 0

    def describe(self) -> dict[str, int]:
        """For the info endpoint."""
        return {
            "owned": len(self),
            "owned_tokens": self.rows,
            "observation_bytes": self.observation_bytes,
            **vars(self.counters),
        }

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, node_id: int) -> bool:
        return node_id in self._spans

    def get(self, node_id: int) -> Span | None:
        return self._spans.get(node_id)

    def owners(self) -> list[int]:
        return list(self._spans)

    def nodes(self) -> set[int]:
        """Nodes with anything in the table."""
        return self._spans.keys() | self._observations.keys()

    def knows(self, node_id: int) -> bool:
        """Whether the table has anything of a node; asked for every node that is evicted."""
        return node_id in self._spans or node_id in self._observations

    def own(self, node_id: int, span: Span, replace: bool = False) -> None:
        """Make ``node_id`` the owner of ``span``; one that it has already stays unless
        ``replace``."""
        if replace:
            self._give_up(node_id)
        if node_id not in self._spans:
            span.acquire()
            self._spans[node_id] = span
            self.touch(span)
            if span.observation is not None:
                self.remember(node_id, span.observation)

    def remember(self, node_id: int, observation: Observation) -> None:
        """Keep with a node what was observed of the queries up to its end, or shortly before."""
        self._forget(node_id)
        self._observations[node_id] = observation
        self.observation_bytes += observation.bytes
        self._limit_observations()

    def _forget(self, node_id: int) -> None:
        observation = self._observations.pop(node_id, None)
        if observation is not None:
            self.observation_bytes -= observation.bytes

    def observation(self, node_id: int) -> Observation | None:
        """What is known of the queries up to the end of a node."""
        found = self._observations.pop(node_id, None)
        if found is not None:
            self._observations[node_id] = found  # to the end of the order: just used
        return found

    def _limit_observations(self) -> None:
        while self._observations and self.observation_bytes > self.observation_limit_bytes:
            node_id = next(iter(self._observations))
            self._forget(node_id)
            if node_id in self._spans:
                self._spans[node_id].observation = None

    def touch(self, span: Span) -> None:
        self._clock += 1
        span.last_used = self._clock

    def drop(self, node_id: int) -> None:
        """The node is gone: give up its span and its observation, if it has them."""
        self._give_up(node_id)
        self._forget(node_id)

    def _give_up(self, node_id: int) -> None:
        span = self._spans.pop(node_id, None)
        if span is not None:
            self.counters.dropped += 1
            span.release()

    def clear(self) -> None:
        for node_id in self.nodes():
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
            self._give_up(node_id)
            self.counters.evicted += 1

    @property
    def rows(self) -> int:
        """Slots of all owned spans."""
        return sum(span.rows for span in self._spans.values())

    @property
    def idle_rows(self) -> int:
        """Slots that `evict_for` can free."""
        return sum(span.rows for span in self._spans.values() if span.references == 1)
