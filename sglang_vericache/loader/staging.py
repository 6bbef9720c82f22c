"""Rows that lie scattered on the device travel the link together, and are spread where they arrive.

The copy engine wants long stretches; a pool that has served for a while hands out slots that are
scattered. Host rows of a node mostly lie together, so they are copied into a buffer on the device,
from which a kernel puts each row into its slot. That kernel has a stream of its own, and there are
two buffers: it shares the device with what the model runs, and the link does not wait for it. Host
rows that are scattered as well are put together first, in a pinned buffer. All buffers are
allocated at the beginning, by the thread that makes this.
"""

from __future__ import annotations

import itertools
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
        self._device = place = device[0].device
        row_bytes = max(layer[0].nbytes for layer in device)
        self._rows = max(size_bytes // row_bytes, 1)
        shape = (self._rows * row_bytes,)
        on_gpu = place.type == "cuda"
        # A kernel moves a number each, so they are as wide as every row allows.
        wide = all(layer[0].nbytes % 8 == 0 for layer in device)
        # While one is read the next layer's rows are put into the other.
        self._there = [_Arrivals(shape, place, wide) for _ in range(2)]
        self._here = [_PinnedRows(shape, on_gpu) for _ in range(2)]
        self._turn = 0
        self._spreading: Any = torch.cuda.Stream(place) if on_gpu else None  # type: ignore[no-untyped-call]

    def copy(self, host_slots: torch.Tensor, device_slots: torch.Tensor) -> None:
        """Order the copy of all layers on the current stream. Allocates nothing on the device.

        Args:
            host_slots: ``[n]`` int64, on the host.
            device_slots: ``[n]`` int64, on the device.
        """
        for first in range(0, host_slots.numel(), self._rows):
            part = slice(first, first + self._rows)
            self._copy_part(host_slots[part], device_slots[part])
        if self._spreading is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._spreading)
            device_slots.record_stream(self._spreading)

    def synchronize(self) -> None:
        """Wait for whatever is still being put into slots."""
        if self._spreading is not None:
            self._spreading.synchronize()

    def _copy_part(self, host_slots: torch.Tensor, device_slots: torch.Tensor) -> None:
        count = host_slots.numel()
        starts = starts_of(host_slots)
        together = len(starts) * LEAST_RUN <= count
        edges = [*starts.tolist(), count] if together else []
        places = host_slots[starts].tolist() if together else []
        # One call orders the copies of several layers, for which Python's lock is taken once.
        at_once = self._rows // count if together else 1
        for first in range(0, len(self._layers), at_once):
            layers = self._layers[first : first + at_once]
            self._turn = 1 - self._turn
            there = self._there[self._turn]
            rows = there.empty([target for _, target in layers], count)
            if together:
                stretches = list(zip(places, edges, edges[1:], strict=False))
                to = [r[a:b] for r in rows for _, a, b in stretches]
                of = [s[place : place + b - a] for s, _ in layers for place, a, b in stretches]
                torch._foreach_copy_(to, of, non_blocking=True)
            else:
                ((source, _),) = layers
                self._here[self._turn].bring(source, host_slots, rows[0])
            there.spread(rows, [t for _, t in layers], device_slots, self._spreading)


class _Arrivals:
    """A buffer on the device.

    Args:
        wide: rows are put into their slots eight bytes at a time.
    """

    def __init__(self, shape: tuple[int, ...], place: torch.device, wide: bool) -> None:
        self._wide = wide
        self._bytes = torch.empty(shape, dtype=torch.uint8, device=place)
        self._filled: Any = None
        self._read: Any = None
        if place.type == "cuda":
            self._filled, self._read = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def empty(self, like: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
        """Its first rows, ``count`` for each of these layers; the current stream writes them once
        they have been read."""
        if self._read is not None:
            self._read.wait()
        sizes = [count * layer[0].nbytes for layer in like]
        ends = itertools.accumulate(sizes)
        return [
            _rows_in(self._bytes[end - size : end], layer, count)
            for layer, size, end in zip(like, sizes, ends, strict=True)
        ]

    def spread(
        self,
        rows: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        slots: torch.Tensor,
        stream: Any,
    ) -> None:
        """Into their slots, behind the current stream's copy."""
        if self._filled is not None:
            self._filled.record()
        with torch.cuda.stream(stream):  # none where there is no GPU
            if self._filled is not None:
                self._filled.wait()
            for arrived, target in zip(rows, targets, strict=True):
                self._flat(target).index_copy_(0, slots, self._flat(arrived))
            if self._read is not None:
                self._read.record()

    def _flat(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, ...]`` as ``[n, m]``."""
        flat = rows.view(rows.shape[0], -1)
        return flat.view(torch.int64) if self._wide else flat


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
