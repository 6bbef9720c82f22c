"""A host pool, a device pool and copiers that misbehave."""

from __future__ import annotations

import threading
import time

import torch

from sglang_vericache.loader.client import LoaderClient
from sglang_vericache.loader.copy import PlainCopier

LAYERS, HOST, DEVICE, HEADS, DIM = 3, 400, 300, 2, 4


class Pools:
    """Host rows that say which they are, and device rows that hold -1."""

    def __init__(self) -> None:
        numbers = torch.arange(HOST, dtype=torch.float32)[:, None, None]
        self.host = [numbers.expand(HOST, HEADS, DIM) + layer / 8 for layer in range(LAYERS)]
        self.device = [torch.full((DEVICE, HEADS, DIM), -1.0) for _ in range(LAYERS)]

    def holds(self, host_slots: torch.Tensor, device_slots: torch.Tensor) -> bool:
        return all(
            torch.equal(device[device_slots], host[host_slots])
            for host, device in zip(self.host, self.device, strict=True)
        )

    @property
    def untouched(self) -> bool:
        return all((layer == -1).all() for layer in self.device)


class FaultyCopier(PlainCopier):
    """
    Attributes:
        gate: nothing is copied while it is closed.
        fail: submissions that raise before they copy.
        die: raise what no copier may: the thread ends.
        order: first host slot of each job, in the order of the copies.
    """

    def __init__(self, pools: Pools) -> None:
        super().__init__(pools.host, pools.device)
        self.gate = threading.Event()
        self.gate.set()
        self.delay_s, self.fail, self.die = 0.0, 0, False
        self.order: list[int] = []
        self.submissions: list[int] = []

    def submit(self, jobs) -> None:
        assert self.gate.wait(10), "the test forgot to open the gate"
        if self.die:
            raise SystemExit("killed")
        if self.fail:
            self.fail -= 1
            raise RuntimeError("the link is cut")
        time.sleep(self.delay_s)
        self.submissions.append(len(jobs))
        self.order += [int(job.host_slots[0]) for job in jobs]
        super().submit(jobs)


def client(pools: Pools, copier: FaultyCopier, **settings) -> LoaderClient:
    return LoaderClient(copier, PlainCopier(pools.host, pools.device), **settings)


def slots(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count)


def wait_for(what, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def collect(loader: LoaderClient, count: int, seconds: float = 10.0) -> list:
    """The next ``count`` jobs that arrive."""
    found: list = []
    deadline = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} arrived"
        found += loader.poll(0.01)
    return found
