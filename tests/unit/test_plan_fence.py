"""That no plan is written over before the device has copied it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import torch

from sglang_vericache.verify.plan_fence import PlanFence, fence_methods


class Device:
    """Runs what it was given only when somebody waits for it: as far behind as it can be."""

    def __init__(self) -> None:
        self.stream: deque[Callable[[], None]] = deque()
        self.waits = 0

    def run_until(self, done: Callable[[], bool]) -> None:
        self.waits += not done()
        while not done():
            self.stream.popleft()()

    def finish(self) -> None:
        while self.stream:
            self.stream.popleft()()


class Backend:
    """Plans in one piece of host memory, from which the device copies later."""

    def __init__(self, device: Device) -> None:
        self.device, self.pinned, self.read = device, [0], []

    def init_forward_metadata(self, number: int) -> None:
        self.pinned[0] = number
        self.device.stream.append(lambda: self.read.append(self.pinned[0]))

    init_forward_metadata_out_graph = init_forward_metadata


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()

    class Event:
        """As torch.cuda.Event: one that was never recorded is not waited for."""

        passed = True

        def record(self) -> None:
            self.passed = False
            device.stream.append(lambda: setattr(self, "passed", True))

        def synchronize(self) -> None:
            device.run_until(lambda: self.passed)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return device


def scheduler_steps(backend: Backend, steps: int, plain_steps: int) -> int:
    """Steps of several forwards, each planned in one way or the other; none of them is waited
    for. How many forwards there were."""
    number = 0
    for step in range(steps):
        for _ in range(plain_steps):
            plan = (backend.init_forward_metadata, backend.init_forward_metadata_out_graph)
            plan[step % 2](number)
            number += 1
    return number


def test_every_forward_reads_its_own_plan(device):
    """Catches a fence that begins anew with each scheduler step: under overlap scheduling the first
    plan of the next step is made while the last but one of this step still runs."""
    backend = Backend(device)
    fence_methods(backend)
    count = scheduler_steps(backend, steps=3, plain_steps=8)
    device.finish()
    assert backend.read == list(range(count))


def test_without_a_fence_plans_are_lost(device):
    """That the model above can tell."""
    backend = Backend(device)
    count = scheduler_steps(backend, steps=3, plain_steps=8)
    device.finish()
    assert backend.read != list(range(count))


def test_the_host_stays_one_plan_ahead(device):
    """Catches a fence that waits for the whole forward: the device would have nothing to do while
    the host prepares the next one."""
    backend = Backend(device)
    fence_methods(backend)
    for number in range(4):
        backend.init_forward_metadata(number)
        device.stream.append(lambda: None)  # the forward itself
        assert device.stream, "the device has caught up"
    assert device.waits == 3


def test_a_capture_is_not_interrupted(device, monkeypatch):
    """Catches a wait inside of a graph's capture, which ends it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    backend = Backend(device)
    fence_methods(backend)
    scheduler_steps(backend, steps=2, plain_steps=2)
    assert device.waits == 0 and len(device.stream) == 4


def test_a_plan_of_its_own(device):
    """Captured verify passes: each shape has its own memory and its own fence."""
    fence, other = PlanFence(), PlanFence()
    with fence.planning():
        pass
    with other.planning():
        pass
    assert device.waits == 0
    with fence.planning():
        pass
    assert device.waits == 1
