"""Rows that lie scattered on the device travel the link together, and are spread where they arrive.

The copy engine wants long stretches; a pool that has served for a while hands out slots that are
scattered. Host rows of a node mostly lie together, so they are copied into a buffer on the device,
from which a kernel puts each row into its slot: the link is as fast as with one stretch, and the
kernel's part is small beside it. Host rows that are scattered as well are put together first, in a
pinned buffer. Both buffers are allocated at the beginning, by the thread that makes this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_vericache.loader.runs import LEAST_RUN, starts_of

# So much of a layer is on its way at a time.
STAGING_BYTES = 32 << 20


class Staging:
    """
    Args:
        host, device: layer by layer, ``[S, H, D]`` (pinned where there is a GPU) and ``[T, H, D]``.
        size_bytes: of each buffer; at least a row.
    """

    def __init__(
        self,
        host: Sequence[torch.Tensor],
        device: Sequence[torch.Tensor],
        size_bytes: int = STAGING_BYTES,
    ) -> None:
        self._layers = list(zip(host, device, strict=True))
        place = device[0].device
        row_bytes = max(layer[0].nbytes for layer in device)
        self._rows = max(size_bytes // row_bytes, 1)
        shape = (self._rows * row_bytes,)
        self._there = torch.empty(shape, dtype=torch.uint8, device=place)
        self._on_gpu = place.type == "cuda"
        # While one is read by the copy engine the next layer's rows are put into the other.
        self._here = [_PinnedRows(shape, self._on_gpu) for _ in range(2)]
        self._turn = 0

    def copy(self, host_slots: torch.Tensor, device_slots: torch.Tensor) -> None:
        """Order the copy of all layers on the current stream. Allocates nothing on the device.

        Args:
            host_slots: ``[n]`` int64, on the host.
            device_slots: ``[n]`` int64, on the device.
        """
        for first in range(0, host_slots.numel(), self._rows):
            part = slice(first, first + self._rows)
            self._copy_part(host_slots[part], device_slots[part])

    def _copy_part(self, host_slots: torch.Tensor, device_slots: torch.Tensor) -> None:
        count = host_slots.numel()
        starts = starts_of(host_slots)
        edges = [*starts, count]
        together = len(starts) * LEAST_RUN <= count
        places = host_slots[starts].tolist() if together else []
        for source, target in self._layers:
            rows = _rows_in(self._there, target, count)
            if together:
                for place, a, b in zip(places, edges, edges[1:], strict=False):
                    rows[a:b].copy_(source[place : place + b - a], non_blocking=True)
            else:
                self._turn = 1 - self._turn
                self._here[self._turn].bring(source, host_slots, rows)
            target.index_copy_(0, device_slots, rows)


class _PinnedRows:
    """A buffer on the host that the copy engine reads."""

    def __init__(self, shape: tuple[int, ...], pinned: bool) -> None:
        self._bytes = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self._read: Any = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def bring(self, source: torch.Tensor, slots: torch.Tensor, target: torch.Tensor) -> None:
        """Scattered rows of ``source`` to ``target``, once what was here before has been read."""
        rows = _rows_in(self._bytes, source, slots.numel())
        if self._read is not None:
            self._read.synchronize()
        torch.index_select(source, 0, slots, out=rows)
        target.copy_(rows, non_blocking=True)
        if self._read is not None:
            self._read.record()


def _rows_in(buffer: torch.Tensor, like: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` rows of a buffer, of the kind that ``like`` has."""
    size = count * like[0].nbytes
    return buffer[:size].view(like.dtype).view(count, *like.shape[1:])
