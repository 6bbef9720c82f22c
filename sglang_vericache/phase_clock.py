"""Seconds that the phases of a scheduler step take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PHASES = ("build", "draft", "verify", "plain", "commit")
# Unread pairs of events; a device that lags behind by more is not worth waiting for.
_MOST_PENDING = 256

Told = Callable[[float], None]


class PhaseClock:
    """``with clock("draft"): ...`` adds to ``clock.seconds["draft"]``; whoever asks is also told
    what that piece of work took.

    Phases do not nest. On a GPU the time is the device's, between two events in the stream; they
    are read back when they have passed, later, so that nothing waits for them. Elsewhere it is
    the host's.

    Args:
        events: False measures only what somebody is told on a GPU, where it costs two events each.
    """

    def __init__(self, device: torch.device | str, events: bool = True) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        on_gpu = torch.device(device).type == "cuda"
        self._counts = events or not on_gpu
        self._time = self._device_time if on_gpu else self._host_time
        self._pending: deque[tuple[Told, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    def __call__(self, phase: str, told: Told | None = None) -> AbstractContextManager[None]:
        """
        Args:
            told: the seconds as well, on a GPU later (`collect`).
        """
        if not self._counts:
            return nullcontext() if told is None else self._time(told)
        return self._time(self._adds_to(phase, told))

    def measured(self, told: Told) -> AbstractContextManager[None]:
        """Tells the seconds of what is done within, whatever phases it consists of."""
        return self._time(told)

    def collect(self) -> None:
        """Add and tell what the device has finished."""
        while self._pending and self._pending[0][2].query():
            told, start, end = self._pending.popleft()
            told(start.elapsed_time(end) / 1000.0)
            self._spare += (start, end)

    def _adds_to(self, phase: str, told: Told | None) -> Told:
        def add(seconds: float) -> None:
            self.seconds[phase] += seconds
            if told is not None:
                told(seconds)

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
