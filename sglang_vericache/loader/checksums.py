"""Whether what comes back from the host is what was written there.

The sums are made on the device, of the rows that were written, and kept on the device, one for each
row of the host pool: so they tell of host memory that was overwritten, of a copy that was cut short
or went wrong in either direction, and of rows taken from the wrong place; and what overwrites host
memory does not reach them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.slot_sums import count_changed, new_weights, slot_sums
from sglang_vericache.loader.job import Job

# More than a copier has under way at a time.
_CELLS = 64
# Cells lie 16 bytes apart, so that one kernel serves them all.
_CELL_INTS = 4


class Checksums:
    """
    Args:
        host, device: layer by layer, ``[S, H, D]`` and ``[T, H, D]``; keys and values alike.
    """

    def __init__(self, host: Sequence[torch.Tensor], device: Sequence[torch.Tensor]) -> None:
        self._host, self._device = list(host), LayerBuffers(device)
        self.place = device[0].device
        self._weights = new_weights(self._device)
        self._sums = torch.zeros(host[0].shape[0], dtype=torch.int64, device=self.place)
        # On a GPU this compiles both kernels here, and not in the loader's thread.
        padding = torch.zeros(1, dtype=torch.int64, device=self.place)
        self.seal(padding, padding)
        self.count_changed(padding, padding, padding.to(torch.int32))

    def places_of(self, host_slots: torch.Tensor) -> torch.Tensor:
        """``host_slots`` on the device, without waiting for it."""
        if self.place.type == "cuda" and not host_slots.is_cuda:
            host_slots = host_slots.pin_memory()
        return host_slots.to(self.place, non_blocking=True)

    def seal(self, host_slots: torch.Tensor, device_slots: torch.Tensor) -> None:
        """Remember what device rows hold that have been written to host rows.

        Args:
            host_slots, device_slots: ``[n]`` int64.
        """
        places, rows = self.places_of(host_slots), device_slots.to(self.place)
        slot_sums(self._device, self._weights, rows, self._sums, places)

    def count_changed(
        self, places: torch.Tensor, device_slots: torch.Tensor, changed: torch.Tensor
    ) -> None:
        """Add to ``changed`` ``[1]`` int32 how many device rows are not what was written to the
        host rows ``places``. Allocates nothing on a GPU."""
        count_changed(self._device, self._weights, device_slots, self._sums, places, changed)

    def find_changed(self, places: torch.Tensor, device_slots: torch.Tensor) -> torch.Tensor:
        """``[n]`` bool: which these are."""
        found = torch.empty(len(device_slots), dtype=torch.int64, device=self.place)
        order = torch.arange(len(device_slots), device=self.place)
        slot_sums(self._device, self._weights, device_slots, found, order)
        return found != self._sums[places]

    def rewrite(self, host_slots: torch.Tensor, device_slots: torch.Tensor) -> None:
        """Write device rows to host rows, and wait until they are there."""
        for target, source in zip(self._host, self._device, strict=True):
            target[host_slots.cpu()] = source[device_slots].to(target.device)
        self.seal(host_slots, device_slots)


class Verdicts:
    """Checks ordered by one copier. A job is asked about once its rows have been copied, and read
    when that has been done; nothing is allocated on the device meanwhile."""

    def __init__(self, checksums: Checksums) -> None:
        self._checksums = checksums
        shape = (_CELLS, _CELL_INTS)
        on_gpu = checksums.place.type == "cuda"
        self._cells = torch.zeros(shape, dtype=torch.int32, device=checksums.place)
        self._found = torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu)

    def ask(self, job: Job) -> None:
        """Order the check on the current stream."""
        cell = self._cells[job.number % _CELLS, :1]
        cell.zero_()
        self._checksums.count_changed(job.places, job.device_slots, cell)
        self._found[job.number % _CELLS, :1].copy_(cell, non_blocking=True)

    def read(self, job: Job) -> int:
        """Changed tokens of a job whose check has been done."""
        return int(self._found[job.number % _CELLS, 0])
