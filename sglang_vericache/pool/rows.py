"""One row of draft slots for each running request: its draft view."""

from __future__ import annotations

import torch

from sglang_vericache.upload import to_device


class DraftRows:
    """Slot table indexed by SGLang's req_pool_idx.

    A row is ``[slots of spans | slots of the tail, filled and spare]``. Its valid length follows
    the committed length of the request, because between two folds the spans are fixed and every
    committed token is one row of the tail:

        view length = committed tokens + offset

    so the device never has to be told an accept count.

    Args:
        rows: rows of the main request table, its padding row 0 included.
        width: slots of a row.
    """

    def __init__(self, rows: int, width: int, device: torch.device | str) -> None:
        self.width = width
        self._table = torch.zeros((rows, width), dtype=torch.int32, device=device)
        self._offsets = torch.zeros(rows, dtype=torch.int64, device=device)
        # Not on the device yet: many requests write a few entries each in the same step.
        self._writes: list[tuple[int, int, torch.Tensor]] = []
        self._ends: dict[int, int] = {}
        self._new_offsets: dict[int, int] = {}

    @property
    def table(self) -> torch.Tensor:
        """``[rows, width]`` int32 slots, always at the same address."""
        self.flush()
        return self._table

    @property
    def offsets(self) -> torch.Tensor:
        """``[rows]`` int64."""
        self.flush()
        return self._offsets

    def write(self, row: int, start: int, slots: torch.Tensor) -> None:
        """Set the entries from ``start`` on."""
        end = start + slots.numel()
        if end > self.width:
            raise AssertionError(f"draft row of {self.width} slots cannot hold {end}")
        if start < self._ends.get(row, 0):
            self.flush()  # which of two writes to one place wins is anybody's guess otherwise
        self._writes.append((row, start, slots))
        self._ends[row] = end

    def set_offset(self, row: int, offset: int) -> None:
        self._new_offsets[row] = offset

    def flush(self) -> None:
        """Bring what was written to the device: a few launches, however many rows."""
        device = self._table.device
        if self._new_offsets:
            rows, offsets = to_device(list(self._new_offsets.items()), device).unbind(1)
            self._offsets[rows] = offsets
            self._new_offsets = {}
        if not self._writes:
            return
        counts = [slots.numel() for _, _, slots in self._writes]
        plan = [(row, start, n) for (row, start, _), n in zip(self._writes, counts, strict=True)]
        row, start, count = to_device(plan, device).unbind(1)
        total = sum(counts)
        write = torch.repeat_interleave(count, output_size=total)
        place = torch.arange(total, device=device) - (count.cumsum(0) - count)[write]
        slots = torch.cat([slots for _, _, slots in self._writes]).to(torch.int32)
        self._table[row[write], start[write] + place] = slots
        self._writes, self._ends = [], {}
