"""DraftRows and DraftView: slots of a request in path order, and the lengths derived from them."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.pool.allocator import SlotAllocator
from sglang_vericache.pool.rows import DraftRows
from sglang_vericache.pool.span import Span
from sglang_vericache.tree.view import DraftView

BUDGET = Budget(0.1, None)


def test_write():
    """Catches entries at the wrong place, and rows that touch each other."""
    rows = DraftRows(3, 10, "cpu")
    rows.write(1, 2, torch.tensor([7, 8, 9]))
    assert rows.table.tolist() == [[0] * 10, [0, 0, 7, 8, 9, 0, 0, 0, 0, 0], [0] * 10]
    assert rows.table.dtype == torch.int32


def test_row_is_filled_to_its_width_and_no_further():
    """Catches slots that are silently cut off: their tokens would be missing and never freed."""
    rows = DraftRows(2, 4, "cpu")
    rows.write(1, 0, torch.tensor([1, 2, 3, 4]))
    with pytest.raises(AssertionError, match="row of 4 slots cannot hold 5"):
        rows.write(1, 3, torch.tensor([5, 6]))


def test_writes_of_a_step_at_once():
    """Catches entries of one row that land in another, empty writes, and an older write that wins
    over a newer one."""
    rows = DraftRows(4, 6, "cpu")
    address = rows.table.data_ptr()
    rows.write(3, 1, torch.tensor([5, 6]))
    rows.write(2, 0, torch.tensor([], dtype=torch.int64))
    rows.write(1, 0, torch.tensor([1, 2, 3]))
    rows.write(3, 3, torch.tensor([7]))
    rows.write(1, 1, torch.tensor([9]))
    rows.set_offset(3, -4)
    rows.set_offset(1, 2)
    rows.set_offset(3, 8)
    assert rows.table.tolist() == [[0] * 6, [1, 9, 3, 0, 0, 0], [0] * 6, [0, 5, 6, 7, 0, 0]]
    assert rows.offsets.tolist() == [0, 2, 0, 8]
    assert rows.table.data_ptr() == address


def test_view_lengths():
    """Catches a view length that is one off: it is where the next token's KV is written."""
    allocator = SlotAllocator(100, "cpu")
    spans = [
        Span(0, 300, allocator.take(30), "path", allocator, BUDGET),
        Span(300, 400, allocator.take(12), "node", allocator, BUDGET),
    ]
    tail = [allocator.take(10), allocator.take(8)]
    view = DraftView(row=1, budget=BUDGET, spans=spans, tail=tail)
    assert view.capacity == 60
    assert (view.tail_start, view.span_rows, view.offset) == (400, 42, -358)
    # 407 committed tokens: 42 rows of spans, then one row for each of 7 tokens.
    assert view.tail_tokens(407) == 7
    assert view.length(407) == 49
    assert view.length(400) == view.span_rows
