"""Keeps the host from running ahead of several steps that it launches in a row."""

from __future__ import annotations

import torch


class StepPacer:
    """Lets the host be one step ahead of the device, as SGLang's overlap loop does.

    FlashInfer plans a step on the host, in pinned memory that is copied to the device when the
    stream gets there: two steps ahead, it would plan over what the step between has not read.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ends: list[torch.cuda.Event] = []

    def wait(self) -> None:
        """Before a step: until the last but one is done, and so the last has begun."""
        if len(self._ends) >= 2:
            self._ends[-2].synchronize()

    def record(self) -> None:
        """After a step was launched."""
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record()
            self._ends.append(event)
