"""The draft view of one running request."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.pool.span import Span


@dataclass(eq=False)
class DraftView:
    """Spans along the path, then the tail.

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
    """

    row: int
    budget: Budget
    spans: list[Span] = field(default_factory=list)
    tail: list[torch.Tensor] = field(default_factory=list)

    @property
    def tail_start(self) -> int:
        return self.spans[-1].end

    @property
    def span_rows(self) -> int:
        return sum(span.rows for span in self.spans)

    @property
    def capacity(self) -> int:
        """Entries of the row that hold slots, spare ones included."""
        return self.span_rows + sum(slots.numel() for slots in self.tail)

    @property
    def offset(self) -> int:
        """View length minus committed tokens; constant until the next fold."""
        return self.span_rows - self.tail_start

    def tail_tokens(self, committed: int) -> int:
        return committed - self.tail_start

    def length(self, committed: int) -> int:
        """Rows that hold the committed tokens."""
        return committed + self.offset
