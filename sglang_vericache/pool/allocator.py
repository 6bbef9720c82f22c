"""Free slots of the draft pool."""

from __future__ import annotations

import torch


class SlotAllocator:
    """Free slots in immutable chunks: returning slots touches the host only.

    Slots come back while a forward that reads them is still running on another stream, and from
    places (eviction, a finished request) that know nothing of streams. Nothing is done on the
    device then; what a later `take` cuts and joins runs on the forward stream, behind that
    forward.

    Args:
        slots: slots 1 to ``slots`` are handed out; slot 0 is padding.
    """

    def __init__(self, slots: int, device: torch.device | str) -> None:
        self.total = slots
        self.free_count = slots
        self._chunks = [torch.arange(1, slots + 1, dtype=torch.int64, device=device)]
        self._none = torch.empty(0, dtype=torch.int64, device=device)
        # Counts frees, so that whoever waits for memory knows when asking again may help.
        self.generation = 0

    def take(self, count: int) -> torch.Tensor | None:
        """``[count]`` int64 slots, or None when fewer are free."""
        if count > self.free_count:
            return None
        self.free_count -= count
        taken: list[torch.Tensor] = []
        while count > 0:
            chunk = self._chunks.pop()
            if chunk.numel() > count:
                self._chunks.append(chunk[count:])
                chunk = chunk[:count]
            taken.append(chunk)
            count -= chunk.numel()
        if not taken:
            return self._none
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def give(self, slots: torch.Tensor) -> None:
        """Return slots that `take` handed out; the tensor must not be written afterwards."""
        count = slots.numel()
        if self.free_count + count > self.total:
            raise AssertionError(f"{count} slots returned, but only {self.used} are out")
        if count:
            self._chunks.append(slots)
        self.free_count += count
        self.generation += 1

    @property
    def used(self) -> int:
        return self.total - self.free_count
