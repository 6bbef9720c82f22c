"""Spans and the table that nodes own them in: who holds a reference, and who goes first."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.compressors.window import QueryWindow
from sglang_vericache.metrics import SpanCounters
from sglang_vericache.pool.allocator import SlotAllocator
from sglang_vericache.pool.span import Span
from sglang_vericache.tree.span_table import SpanTable

SLOTS = 100
# Float32 queries of one layer, one head and one dimension.
QUERY_BYTES = 4


@pytest.fixture
def allocator() -> SlotAllocator:
    return SlotAllocator(SLOTS, "cpu")


@pytest.fixture
def table() -> SpanTable:
    table = SpanTable(SpanCounters())
    table.observation_limit_bytes = 20 * QUERY_BYTES
    return table


BUDGET = Budget(0.2, None)


def new_span(allocator: SlotAllocator, rows: int = 10, queries: int = 0) -> Span:
    window = QueryWindow(torch.zeros(1, queries, 1, 1), tuple(range(50 - queries, 50)), 64)
    return Span(0, 50, allocator.take(rows), "path", allocator, BUDGET, window if queries else None)


def test_slots_go_back_with_the_last_reference(allocator):
    """Catches slots freed under a view that still reads them, and slots never freed."""
    span = new_span(allocator)
    span.acquire()
    span.acquire()
    span.release()
    assert allocator.used == 10
    span.release()
    assert allocator.used == 0


def test_released_too_often_raises(allocator):
    """Catches a second free of slots that others may hold by now."""
    span = new_span(allocator)
    span.acquire()
    span.release()
    with pytest.raises(AssertionError, match=r"\[0, 50\) released more"):
        span.release()
    assert allocator.used == 0


def test_owning_holds_a_reference(table, allocator):
    """Catches a span that goes with the view that built it, though a node owns it."""
    span = new_span(allocator)
    span.acquire()
    table.own(1, span)
    span.release()
    assert table.get(1) is span
    assert (1 in table, len(table), table.rows, allocator.used) == (True, 1, 10, 10)
    table.drop(1)
    assert table.get(1) is None
    assert (1 in table, len(table), table.rows, allocator.used) == (False, 0, 0, 0)
    assert table.counters.dropped == 1


def test_a_node_keeps_the_span_it_has(table, allocator):
    """Catches a replaced span whose reference is lost, and one that is counted twice."""
    first, second = new_span(allocator), new_span(allocator)
    second.acquire()
    table.own(1, first)
    table.own(1, second)
    table.own(1, first)
    assert table.get(1) is first
    assert (first.references, second.references) == (1, 1)


def test_replacing_a_span(table, allocator):
    """Catches a node that keeps a span which no longer fits its path's budget."""
    first, second = new_span(allocator), new_span(allocator)
    table.own(1, first)
    table.own(1, second, replace=True)
    assert table.get(1) is second
    assert (first.references, second.references, table.counters.dropped) == (0, 1, 1)
    assert allocator.used == 10


def test_dropping_what_a_view_reads(table, allocator):
    """Catches slots taken from a running request when its node goes."""
    span = new_span(allocator)
    span.acquire()
    table.own(1, span)
    table.drop(1)
    assert allocator.used == 10
    span.release()
    assert allocator.used == 0


def test_drop_of_an_unknown_node_is_nothing(table):
    """Catches a node without a span that raises as it goes, or is counted."""
    table.drop(99)
    assert table.counters.dropped == 0


def test_clear_drops_all(table, allocator):
    """Catches a dictionary that changes while it is walked, and spans that survive a flush."""
    for node in range(5):
        table.own(node, new_span(allocator))
    assert sorted(table.owners()) == [0, 1, 2, 3, 4]
    table.clear()
    assert (len(table), allocator.used, table.counters.dropped) == (0, 0, 5)


@pytest.mark.parametrize(
    ("free_slots", "gone"),
    [
        (50, []),
        (51, [0]),
        (60, [0]),
        (61, [0, 1]),
        (85, [0, 1, 2, 3]),
        (100, [0, 1, 2, 3, 4]),
        (101, []),
    ],
)
def test_evicts_the_longest_unused_first(table, allocator, free_slots, gone):
    """Catches an order by age of building, one span more than needed, and an endless loop when
    even all of them are not enough."""
    spans = [new_span(allocator) for _ in range(5)]
    for node in (3, 2, 4, 1, 0):
        table.own(node, spans[node])
    for node in range(5):
        table.touch(spans[node])
    table.evict_for(free_slots)
    assert [node for node in range(5) if node not in table] == gone
    assert table.counters.evicted == table.counters.dropped == len(gone)
    assert allocator.used == 10 * (5 - len(gone))


def test_spans_in_use_are_not_evicted(table, allocator):
    """Catches eviction of what a draft view reads: it would free no slot and lose the span."""
    used, idle = new_span(allocator), new_span(allocator)
    used.acquire()
    table.own(1, used)
    table.own(2, idle)
    table.evict_for(SLOTS - 10)
    assert (1 in table, 2 in table) == (True, False)
    assert (table.counters.evicted, allocator.used) == (1, 10)


def test_owning_counts_as_use(table, allocator):
    """Catches a new span that is evicted before old ones because it was never touched."""
    old, new = new_span(allocator), new_span(allocator)
    table.own(1, old)
    table.touch(old)
    table.own(2, new)
    table.evict_for(SLOTS - 10)
    assert (1 in table, 2 in table) == (False, True)


def test_an_observation_outlives_its_evicted_span(table, allocator):
    """Catches queries that go with the span: the next selection at the node would do without."""
    span = new_span(allocator, queries=8)
    table.own(1, span)
    table.evict_for(SLOTS)
    assert (1 in table, allocator.used) == (False, 0)
    assert table.observation(1) is span.observation
    assert table.nodes() == {1}


@pytest.mark.parametrize("evicted", [False, True])
def test_an_observation_goes_with_its_node(table, allocator, evicted):
    """Catches queries of nodes that are gone, which nobody could ever ask for."""
    table.own(1, new_span(allocator, queries=8))
    if evicted:
        table.evict_for(SLOTS)
    table.drop(1)
    assert (table.observation(1), table.nodes(), table.observation_bytes) == (None, set(), 0)


def test_clear_drops_observations_without_spans(table, allocator):
    """Catches a flushed tree whose queries stay."""
    table.own(1, new_span(allocator, queries=8))
    table.evict_for(SLOTS)
    table.clear()
    assert (table.nodes(), table.observation_bytes) == (set(), 0)


def test_observations_are_bounded(table, allocator):
    """Catches queries of thousands of nodes beside a pool that is sized to the last byte, the one
    just used thrown out, and one that the span still holds."""
    spans = [new_span(allocator, queries=8) for _ in range(3)]
    for node_id in (0, 1):
        table.own(node_id, spans[node_id])
    assert table.observation(0) is not None  # used: node 1 is the older now
    table.own(2, spans[2])
    assert table.observation_bytes == 16 * QUERY_BYTES
    assert [span.observation is None for span in spans] == [False, True, False]
    assert table.observation(1) is None
    assert len(table) == 3, "the spans stay"


def test_replacing_a_span_keeps_what_is_known(table, allocator):
    """Catches queries lost where a span that did not fit is selected anew without any."""
    first = new_span(allocator, queries=8)
    table.own(1, first)
    table.own(1, new_span(allocator), replace=True)
    assert table.observation(1) is first.observation
    newer = new_span(allocator, queries=9)
    table.own(1, newer, replace=True)
    assert table.observation(1) is newer.observation


def test_an_observation_needs_no_span(table):
    """Catches queries of a prompt that was never drafted from, lost to those that continue it."""
    seen = QueryWindow(torch.zeros(1, 8, 1, 1), tuple(range(42, 50)), 64)
    table.remember(3, seen)
    assert table.observation(3) is seen and table.nodes() == {3}
    table.drop(3)
    assert table.observation(3) is None


def test_what_it_knows_of_a_node(table):
    """Catches a node whose observation stays when it goes: it may have that without a span."""
    table.remember(7, QueryWindow(torch.zeros(1, 8, 1, 1), tuple(range(42, 50)), 64))
    assert table.knows(7) and not table.knows(8)
    table.drop(7)
    assert not table.knows(7) and not table.nodes()
