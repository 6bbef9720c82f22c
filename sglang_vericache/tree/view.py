"""The draft view of one running request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.pool.span import Span


@dataclass(eq=False)
class DraftView:
    """Spans along the path, then the tail. What is counted of them is asked for in every step of
    every request, so it is kept.

    ::

        path     0 ........ spans ........ tail_start ..... committed ... drafted
        row      [ rows of spans           | tail: one row a token      | spare ]
                 0                    span_rows                       capacity

    Attributes:
        row: the request's row in both request tables.
        budget: the most generous of the request's own and those of the spans it reuses; the
            row limit of the view, and of what is folded into it.
        spans: contiguous, from path position 0 to tail_start; one reference each is held.
        tail: slots of the tail in row order, spare ones included, as they were taken.
        capacity: entries of the row that hold slots, spare ones included.
        offset: view length minus committed tokens; constant until the next fold.
    """

    row: int
    budget: Budget
    spans: tuple[Span, ...] = ()
    tail: tuple[torch.Tensor, ...] = ()
    tail_start: int = field(init=False)
    span_rows: int = field(init=False)
    capacity: int = field(init=False)
    offset: int = field(init=False)

    def __post_init__(self) -> None:
        self.set(self.spans, self.tail)

    def set(self, spans: Sequence[Span], tail: Sequence[torch.Tensor]) -> None:
        self.spans, self.tail = tuple(spans), tuple(tail)
        self.tail_start = self.spans[-1].end if self.spans else 0
        self.span_rows = sum(span.rows for span in self.spans)
        self.capacity = self.span_rows + sum(slots.numel() for slots in self.tail)
        self.offset = self.span_rows - self.tail_start

    def append_tail(self, slots: torch.Tensor) -> None:
        self.tail = (*self.tail, slots)
        self.capacity += slots.numel()

    def tail_tokens(self, committed: int) -> int:
        return committed - self.tail_start

    def length(self, committed: int) -> int:
        """Rows that hold the committed tokens."""
        return committed + self.offset
