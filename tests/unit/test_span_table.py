"""Spans and the table that nodes own them in: who holds a reference, and who goes first."""

from __future__ import annotations

import pytest

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.metrics import SpanCounters
from sglang_vericache.pool.allocator import SlotAllocator
from sglang_vericache.pool.span import Span
from sglang_vericache.tree.span_table import SpanTable

SLOTS = 100


@pytest.fixture
def allocator() -> SlotAllocator:
    return SlotAllocator(SLOTS, "cpu")


@pytest.fixture
def table() -> SpanTable:
    return SpanTable(SpanCounters())


def new_span(allocator: SlotAllocator, rows: int = 10) -> Span:
    return Span(0, 50, allocator.take(rows), "path", allocator, Budget(0.2, None))


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
