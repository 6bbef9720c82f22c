"""Keeps the host from running ahead of several steps that it launches in a row."""

from __future__ import annotations

import torch


class StepPacer:
    """Lets the host be one step ahead of the device, as SGLang's overlap loop does.

    FlashInfer plans a step on the host, in pinned memory that is copied to the device when the
    stream gets there: a step planned before the last one has begun would overwrite what that one
    is to read.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._last: torch.cuda.Event | None = None

    def begin(self) -> None:
        """A step is launched next: wait until the device has begun with the last one."""
        if self._last is not None:
            self._last.synchronize()
        if self._on_gpu:
            self._last = torch.cuda.Event()
            self._last.record()
