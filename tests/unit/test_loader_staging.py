"""Scattered rows by way of a buffer, against one assignment a layer."""

from __future__ import annotations

import itertools

import pytest
import torch

from sglang_vericache.loader import staging
from sglang_vericache.loader.copy import StreamCopier
from sglang_vericache.loader.job import Job
from sglang_vericache.loader.runs import LEAST_RUN, starts_of
from sglang_vericache.loader.staging import Staging

TOKENS, HEADS, DIM, LAYERS = 900, 2, 4, 3
ROW_BYTES = HEADS * DIM * 2


def pools(place: str = "cpu"):
    shape = (TOKENS, HEADS, DIM)
    host = [torch.randn(shape).to(torch.bfloat16) for _ in range(LAYERS)]
    if place != "cpu":
        host = [layer.pin_memory() for layer in host]
    return host, [torch.zeros(shape, dtype=torch.bfloat16, device=place) for _ in host]


def shuffled(*ranges: range) -> torch.Tensor:
    """Each range whole, in another order."""
    order = torch.randperm(len(ranges)).tolist()
    return torch.tensor([slot for i in order for slot in ranges[i]])


def copied(host, device, host_slots, device_slots, size_bytes) -> list[torch.Tensor]:
    wanted = [layer.cpu().clone() for layer in device]
    for source, target in zip(host, wanted, strict=True):
        target[device_slots] = source[host_slots]
    way = Staging(host, device, size_bytes)
    way.copy(host_slots, device_slots.to(device[0].device))
    return wanted


@pytest.mark.parametrize("rows", [1, 7, 100, 4096])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("count", [1, 99, 100, 101, 500])
def test_every_row_arrives(rows, together, count):
    """Catches rows at the ends of parts, and a buffer that is filled before it was emptied."""
    host, device = pools()
    slots = torch.arange(150, 150 + count) if together else torch.randperm(TOKENS)[:count]
    places = torch.randperm(TOKENS)[:count]
    wanted = copied(host, device, slots, places, rows * ROW_BYTES)
    for found, expected in zip(device, wanted, strict=True):
        assert torch.equal(found, expected)


def test_long_runs_are_not_put_together_on_the_host(monkeypatch):
    """Catches a processor's copy of what the copy engine could fetch, and short copies of it."""
    host, device = pools()
    brought = []
    bring = staging._PinnedRows.bring

    def spy(self, source, slots, target):
        brought.append(slots.numel())
        bring(self, source, slots, target)

    monkeypatch.setattr(staging._PinnedRows, "bring", spy)
    long = shuffled(*(range(a, a + LEAST_RUN) for a in range(0, 640, 2 * LEAST_RUN)))
    copied(host, device, long, torch.randperm(TOKENS)[: len(long)], 4096 * ROW_BYTES)
    assert not brought
    short = shuffled(*(range(a, a + LEAST_RUN - 1) for a in range(0, 640, 2 * LEAST_RUN)))
    copied(host, device, short, torch.randperm(TOKENS)[: len(short)], 4096 * ROW_BYTES)
    assert brought == [len(short)] * LAYERS


def test_a_row_larger_than_the_buffer():
    host, device = pools()
    slots = torch.tensor([5, 3, 8])
    wanted = copied(host, device, slots, slots, 1)
    assert all(torch.equal(a, b) for a, b in zip(device, wanted, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_starts(seed):
    """Against the definition."""
    torch.manual_seed(seed)
    one = torch.cat([torch.arange(a, a + 3) for a in torch.randint(0, 30, (8,)).tolist()])
    other = torch.cat([torch.arange(a, a + 4) for a in torch.randint(0, 30, (6,)).tolist()])
    pairs = list(zip(one.tolist(), other.tolist(), strict=True))
    wanted = [
        i + 1
        for i, (a, b) in enumerate(itertools.pairwise(pairs))
        if (b[0], b[1]) != (a[0] + 1, a[1] + 1)
    ]
    assert starts_of(one, other).tolist() == [0, *wanted]
    assert starts_of(one[:0], other[:0]).tolist() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("together", [True, False])
def test_on_a_gpu(together):
    """Catches a pinned buffer that is filled anew while the copy engine reads it, and memory that
    is allocated on the device."""
    host, device = pools("cuda")
    way = Staging(host, device, 100 * ROW_BYTES)
    for _ in range(20):
        slots = torch.arange(600) if together else torch.randperm(TOKENS)[:600]
        places = torch.randperm(TOKENS)[:600]
        there = places.cuda()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        way.copy(slots, there)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        torch.cuda.synchronize()
        for source, target in zip(host, device, strict=True):
            assert torch.equal(target.cpu()[places], source[slots])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("together", [True, False])
def test_the_next_copy_is_ordered_while_the_device_works(together):
    """Catches a thread that waits for what its copy waits for: the link would rest afterwards,
    while the next copy is prepared."""
    host, device = pools("cuda")
    copier = StreamCopier(host, device)
    copier.enter()
    jobs = []
    forward = torch.cuda.Stream()
    for number in range(3):
        slots = torch.arange(600)
        places = (slots if together else torch.randperm(TOKENS)[:600]).cuda()
        with torch.cuda.stream(forward):
            torch.cuda._sleep(2_000_000_000)  # about a second
            read = torch.cuda.Event()
            read.record()
        there = torch.cuda.Event()
        there.record()
        jobs.append(Job(number, slots, places, (read, there)))
    copier.submit(jobs)
    assert not jobs[0].after[0].query() and not any(copier.arrived(job) for job in jobs)
    torch.cuda.synchronize()
    assert all(copier.arrived(job) for job in jobs)
    last = jobs[-1]
    for source, target in zip(host, device, strict=True):
        assert torch.equal(target[last.device_slots].cpu(), source[last.host_slots])
