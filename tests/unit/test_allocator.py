"""Free slots of the draft pool: each is out once, and the counts say how many."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_vericache.pool.allocator import SlotAllocator


def test_hands_out_every_slot_once_and_never_zero():
    """Catches a range that is one off: slot 0 is padding, slot `total` is usable."""
    allocator = SlotAllocator(7, "cpu")
    slots = torch.cat([allocator.take(3), allocator.take(4)])
    assert sorted(slots.tolist()) == [1, 2, 3, 4, 5, 6, 7]
    assert slots.dtype == torch.int64


def test_taken_slots_do_not_change_later():
    """Catches a view of the stack: the next `give` and `take` would rewrite its holder's slots."""
    allocator = SlotAllocator(6, "cpu")
    first, second = allocator.take(2), allocator.take(3)
    before = first.tolist()
    allocator.give(second)
    allocator.give(allocator.take(1))
    allocator.give(torch.tensor(allocator.take(4).tolist()[::-1]))
    assert first.tolist() == before


def test_refuses_more_than_is_free():
    """Catches a partial grant, and slots lost to a request that was refused."""
    allocator = SlotAllocator(4, "cpu")
    held = allocator.take(3)
    assert allocator.take(2) is None
    assert (allocator.free_count, allocator.used) == (1, 3)
    assert allocator.take(1).numel() == 1
    assert allocator.take(1) is None
    assert allocator.take(0).numel() == 0
    allocator.give(held)
    assert (allocator.free_count, allocator.used) == (3, 1)


def test_returning_too_many_raises():
    """Catches a double free, which would hand one slot to two requests."""
    allocator = SlotAllocator(4, "cpu")
    slots = allocator.take(2)
    allocator.give(slots)
    with pytest.raises(AssertionError, match="2 slots returned, but only 0 are out"):
        allocator.give(slots)
    assert allocator.free_count == 4


def test_generation_counts_frees():
    """Catches a waiter for memory that is never told to ask again, or told without reason."""
    allocator = SlotAllocator(4, "cpu")
    slots = allocator.take(2)
    assert allocator.generation == 0
    allocator.give(slots)
    assert allocator.generation == 1


def test_random_traffic_keeps_slots_apart():
    """Catches any order of takes and gives that hands a slot to two holders or loses one."""
    allocator, rng, held = SlotAllocator(50, "cpu"), random.Random(3), []
    for _ in range(400):
        slots = allocator.take(rng.randint(1, 12)) if rng.random() < 0.55 else None
        if slots is not None:
            held.append(slots)
        elif held:
            allocator.give(held.pop(rng.randrange(len(held))))
        out = [slot for slots in held for slot in slots.tolist()]
        assert len(out) == len(set(out)) == allocator.used
        assert set(out) <= set(range(1, 51))
