"""Free slots of the draft pool."""

from __future__ import annotations

import torch


class SlotAllocator:
    """Stack of free slots kept on the device, counted on the host: no synchronisation.

    Args:
        slots: slots 1 to ``slots`` are handed out; slot 0 is padding.
    """

    def __init__(self, slots: int, device: torch.device | str) -> None:
        self.total = slots
        self.free_count = slots
        self._stack = torch.arange(slots, 0, -1, dtype=torch.int64, device=device)
        # Counts frees, so that whoever waits for memory knows when asking again may help.
        self.generation = 0

    def take(self, count: int) -> torch.Tensor | None:
        """``[count]`` int64 slots, or None when fewer are free."""
        if count > self.free_count:
            return None
        self.free_count -= count
        # A view of the stack would change under its holder with the next `give`.
        return self._stack[self.free_count : self.free_count + count].clone()

    def give(self, slots: torch.Tensor) -> None:
        """Return slots that `take` handed out."""
        count = slots.numel()
        if self.free_count + count > self.total:
            raise AssertionError(f"{count} slots returned, but only {self.used} are out")
        self._stack[self.free_count : self.free_count + count] = slots
        self.free_count += count
        self.generation += 1

    @property
    def used(self) -> int:
        return self.total - self.free_count
