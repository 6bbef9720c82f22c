"""Seconds that the phases of a scheduler step take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

PHASES = ("build", "draft", "verify", "plain", "commit")
# Unread pairs of events; a device that lags behind by more is not worth waiting for.
_MOST_PENDING = 256

Told = Callable[[float], None]


class PhaseClock:
    """``with clock("draft"): ...`` adds to ``clock.seconds["draft"]``; ``measured`` tells what one
    piece of work took.

    Phases do not nest. On a GPU the time is the device's, between two events in the stream; they
    are read back when they have passed, later, so that nothing waits for them. Elsewhere it is
    the host's.

    Args:
        events: False measures no phases on a GPU, where it costs two events each.
    """

    def __init__(self, device: torch.device | str, events: bool = True) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._measure: Callable[[str], Any] = self._by_host
        self._on_gpu = torch.device(device).type == "cuda"
        if self._on_gpu:
            self._measure = self._by_events if events else self._not_at_all
        self._pending: deque[tuple[Told, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    def __call__(self, phase: str):
        return self._measure(phase)

    @contextmanager
    def _not_at_all(self, phase: str) -> Iterator[None]:
        yield

    @contextmanager
    def _by_host(self, phase: str) -> Iterator[None]:
        with self._host_time(self._adds_to(phase)):
            yield

    @contextmanager
    def _by_events(self, phase: str) -> Iterator[None]:
        with self._device_time(self._adds_to(phase)):
            yield

    def measured(self, told: Told) -> AbstractContextManager[None]:
        """Tells the seconds of what is done within, on a GPU later (`collect`)."""
        return self._device_time(told) if self._on_gpu else self._host_time(told)

    def collect(self) -> None:
        """Add and tell what the device has finished."""
        while self._pending and self._pending[0][2].query():
            told, start, end = self._pending.popleft()
            told(start.elapsed_time(end) / 1000.0)
            self._spare += (start, end)

    def _adds_to(self, phase: str) -> Told:
        def add(seconds: float) -> None:
            self.seconds[phase] += seconds

        return add

    @contextmanager
    def _host_time(self, told: Told) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            told(time.perf_counter() - start)

    @contextmanager
    def _device_time(self, told: Told) -> Iterator[None]:
        self.collect()
        if len(self._pending) >= _MOST_PENDING:
            yield
            return
        start, end = self._event(), self._event()
        start.record()
        try:
            yield
        finally:
            end.record()
            self._pending.append((told, start, end))

    def _event(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
