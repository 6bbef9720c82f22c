"""Keeps FlashInfer's plans from being written over before the device has read them.

A plan is made on the host, in pinned memory that its wrapper keeps, and copied to the device when
the stream gets there. The next plan of the same wrapper goes into the same memory: made before
that copy has run, it is what the pass before it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PlanFence:
    """Around each plan that goes into one piece of pinned memory."""

    def __init__(self) -> None:
        self._copied: torch.cuda.Event | None = None

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Wait until the device has copied the last plan; a plan is made inside."""
        if self._copied is not None:
            self._copied.synchronize()
        else:
            self._copied = torch.cuda.Event()
        yield
        self._copied.record()


def fence_plans(backend: Any) -> None:
    """Fence all that a FlashInfer backend of SGLang plans, and the parts of a mixed one.

    SGLang relies on its scheduler for this: it launches one forward a step, and by then the last
    but one is done. Several plain steps are launched in one scheduler step here, and the next step
    does not wait for them.
    """
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

    for name in ("prefill_backend", "decode_backend", None):
        part = backend if name is None else getattr(backend, name, None)
        if isinstance(part, FlashInferAttnBackend):
            fence_methods(part)


def fence_methods(backend: Any) -> None:
    """Put one fence around both ways in which a backend is told to plan."""
    fence = PlanFence()
    for name in ("init_forward_metadata", "init_forward_metadata_out_graph"):
        setattr(backend, name, _fenced(getattr(backend, name), fence))


def _fenced(plan: Any, fence: PlanFence) -> Any:
    def fenced_plan(*args, **kwargs):
        # Inside a capture nothing can be waited for, and nothing is copied.
        if torch.cuda.is_current_stream_capturing():
            return plan(*args, **kwargs)
        with fence.planning():
            return plan(*args, **kwargs)

    return fenced_plan
