"""One row of draft slots for each running request: its draft view."""

from __future__ import annotations

import torch


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
        self.table = torch.zeros((rows, width), dtype=torch.int32, device=device)
        self.offsets = torch.zeros(rows, dtype=torch.int64, device=device)

    def write(self, row: int, start: int, slots: torch.Tensor) -> None:
        """Set the entries from ``start`` on."""
        end = start + slots.numel()
        if end > self.width:
            raise AssertionError(f"draft row of {self.width} slots cannot hold {end}")
        self.table[row, start:end] = slots.to(torch.int32)

    def set_offset(self, row: int, offset: int) -> None:
        self.offsets[row] = offset
