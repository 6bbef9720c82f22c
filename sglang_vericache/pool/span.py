"""Compressed KV of an interval of a path."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sglang_vericache.compressors.base import Scope
from sglang_vericache.compressors.budget import Budget
from sglang_vericache.compressors.watch import Observation
from sglang_vericache.pool.allocator import SlotAllocator


@dataclass(eq=False)
class Span:
    """Immutable rows of the draft pool that stand for the tokens [start, end) of a path.

    Counted references: each draft view that contains it holds one, and the table of spans holds
    one while a node owns it. The slots go back with the last reference.

    Attributes:
        slots: ``[rows]`` int64 slots of the draft pool.
        scope: what the selection depended on.
        budget: within which it was selected.
        observation: what is known of the path's queries, for a later selection that sees too few
            of its own.
    """

    start: int
    end: int
    slots: torch.Tensor
    scope: Scope
    allocator: SlotAllocator = field(repr=False)
    budget: Budget
    observation: Observation | None = field(default=None, repr=False)
    references: int = 0
    last_used: int = 0

    @property
    def rows(self) -> int:
        return self.slots.numel()

    def acquire(self) -> None:
        self.references += 1

    def release(self) -> None:
        if self.references <= 0:
            raise AssertionError(f"span [{self.start}, {self.end}) released more than acquired")
        self.references -= 1
        if self.references == 0:
            self.allocator.give(self.slots)
