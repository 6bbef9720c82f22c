"""How bytes get from the host pool to the device pool. Allocates nothing on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from sglang_vericache.loader.checksums import Checksums, Verdicts
from sglang_vericache.loader.job import Job
from sglang_vericache.loader.runs import Run, runs_of, starts_of
from sglang_vericache.loader.staging import Staging

# More runs a layer go by way of the buffer. Each copy takes about 10 us to order, in which the link
# would carry half a MiB; and of a thousand that are under way the driver makes every other thread
# wait that wants to order anything, until some have arrived.
FEW_RUNS = 4


class PlainCopier:
    """Copies on the host, at once: for SGLang's CPU engine and for tests.

    Args:
        host, device: layer by layer, ``[S, H, D]`` and ``[T, H, D]``; keys and values alike.
        checksums: tell what arrived changed; None believes everything.
    """

    def __init__(
        self,
        host: Sequence[torch.Tensor],
        device: Sequence[torch.Tensor],
        checksums: Checksums | None = None,
    ) -> None:
        self._layers = list(zip(host, device, strict=True))
        self._token_bytes = sum(layer[0].nbytes for layer in host)
        self._verdicts = None if checksums is None else Verdicts(checksums)

    def enter(self) -> None:
        pass

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            began = time.perf_counter()
            for source, target in self._layers:
                target[job.device_slots] = source[job.host_slots]
            job.seconds = time.perf_counter() - began
            if self._verdicts is not None and job.places is not None:
                self._verdicts.ask(job)
                job.changed = self._verdicts.read(job)

    def arrived(self, job: Job) -> bool:
        return True

    def bytes_of(self, job: Job) -> int:
        return self._token_bytes * job.tokens


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class StreamCopier:
    """Copies on a CUDA stream of its own, from pinned memory: in slices as large as they come, or,
    where they are short, by way of `Staging`.

    Args:
        host: layer by layer, ``[S, H, D]`` pinned; keys and values alike.
        device: layer by layer, ``[T, H, D]``.
        checksums: tell what arrived changed, on a stream of their own: the link does not wait;
            None believes everything.
    """

    def __init__(
        self,
        host: Sequence[torch.Tensor],
        device: Sequence[torch.Tensor],
        checksums: Checksums | None = None,
    ) -> None:
        self._layers = list(zip(host, device, strict=True))
        self._token_bytes = sum(layer[0].nbytes for layer in host)
        self._verdicts = None if checksums is None else Verdicts(checksums)
        self._device = device[0].device
        self._staging = Staging(host, device)
        self._copied: dict[int, tuple[Any, Any]] = {}  # events around the copy

    def enter(self) -> None:
        torch.cuda.set_device(self._device)
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._checks: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._asks: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def submit(self, jobs: Sequence[Job]) -> None:
        try:
            with torch.cuda.stream(self._stream):
                for job in jobs:
                    self._submit(job)
        except Exception:
            for job in jobs:
                self._copied.pop(job.number, None)
            self._stream.synchronize()  # nothing may write after we say that it failed
            self._staging.synchronize()
            self._checks.synchronize()
            raise

    def _submit(self, job: Job) -> None:
        # On a stream of its own: ordered behind the copies before, this would keep the thread until
        # they have arrived, and the link would rest while this one is prepared.
        with torch.cuda.stream(self._asks):
            for event in job.after[-1:]:
                self._asks.wait_event(event)
            device_slots = job.device_slots.cpu()
        host_slots = job.host_slots.cpu()
        for event in job.after:
            self._stream.wait_event(event)
        began = _event()
        began.record()
        starts = starts_of(host_slots, device_slots)
        if len(starts) <= FEW_RUNS:
            self._copy_runs(runs_of(host_slots, device_slots, starts))
        else:
            self._staging.copy(host_slots, job.device_slots)
        copied = _event()
        copied.record()
        job.device_slots.record_stream(self._stream)
        self._copied[job.number] = (began, copied)
        job.arrived = self._check(job, copied)

    def _check(self, job: Job, copied: Any) -> Any:
        """Order the check; the event after which the rows may be read, and its outcome."""
        if self._verdicts is None or job.places is None:
            return copied
        with torch.cuda.stream(self._checks):
            self._checks.wait_event(copied)
            self._verdicts.ask(job)
            checked = _event()
            checked.record()
            job.device_slots.record_stream(self._checks)
            job.places.record_stream(self._checks)
        return checked

    def _copy_runs(self, runs: Sequence[Run]) -> None:
        """In one call, which takes Python's lock once: the scheduler's thread holds it a lot."""
        to = [t[run.device : run.device + run.count] for _, t in self._layers for run in runs]
        of = [s[run.host : run.host + run.count] for s, _ in self._layers for run in runs]
        if to:
            torch._foreach_copy_(to, of, non_blocking=True)

    def arrived(self, job: Job) -> bool:
        if not job.arrived.query():
            return False
        began, copied = self._copied.pop(job.number)
        job.seconds = began.elapsed_time(copied) / 1e3
        if self._verdicts is not None and job.places is not None:
            job.changed = self._verdicts.read(job)
        return True

    def bytes_of(self, job: Job) -> int:
        return self._token_bytes * job.tokens
