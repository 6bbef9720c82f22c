"""Checked copies through the loader: what changed on the host is told, and nothing else."""

from __future__ import annotations

import pytest
import torch
from loader_fakes import HOST, LAYERS, FaultyCopier, Pools, collect, slots

from sglang_vericache.loader.checksums import Checksums, Verdicts
from sglang_vericache.loader.client import LoaderClient
from sglang_vericache.loader.copy import PlainCopier, StreamCopier
from sglang_vericache.loader.job import Job

WRITTEN = slots(50, 80)


class Checked:
    """Device rows 0 to 79 were written to host rows 50 to 129; fetched they go to 100 to 179."""

    def __init__(self) -> None:
        self.pools = Pools()
        self.pools.host = [layer.clone() for layer in self.pools.host]
        for host, device in zip(self.pools.host, self.pools.device, strict=True):
            device[:80] = torch.randn_like(device[:80])
            host[WRITTEN] = device[:80]
        self.checksums = Checksums(self.pools.host, self.pools.device)
        self.checksums.seal(WRITTEN, slots(0, 80))
        self.copier = FaultyCopier(self.pools)
        self.copier._verdicts = Verdicts(self.checksums)
        fallback = PlainCopier(self.pools.host, self.pools.device, self.checksums)
        self.loader = LoaderClient(self.copier, fallback)

    def fetch(self, host_slots=WRITTEN, first: int = 100) -> Job:
        rows = slots(first, len(host_slots))
        self.loader.fetch(host_slots, rows, places=self.checksums.places_of(host_slots))
        (job,) = collect(self.loader, 1)
        return job

    def changed(self, job: Job) -> list[int]:
        """Host rows that the job brought changed."""
        found = self.checksums.find_changed(job.places, job.device_slots)
        assert int(found.sum()) == job.changed
        return job.host_slots[found].tolist()


@pytest.fixture
def checked():
    made = Checked()
    yield made
    made.loader.close()


def test_what_is_whole(checked):
    for host_slots in (WRITTEN, WRITTEN.flip(0), WRITTEN[10:11], WRITTEN[::3]):
        assert checked.fetch(host_slots).changed == 0
    assert checked.loader.counters.corrupt == checked.loader.counters.corrupt_tokens == 0


def test_a_flipped_bit(checked):
    for layer in range(LAYERS):
        checked.pools.host[layer][70 + layer].view(torch.uint8)[1, 5] ^= 16
    assert checked.changed(checked.fetch()) == [70, 71, 72]
    assert checked.fetch(WRITTEN[30:]).changed == 0
    counters = checked.loader.counters
    assert (counters.corrupt, counters.corrupt_tokens, counters.fetches) == (1, 3, 2)


def test_swapped_rows_and_layers(checked):
    host = checked.pools.host
    for layer in host:
        layer[[60, 61]] = layer[[61, 60]]
    host[0][80], host[1][80] = host[1][80].clone(), host[0][80].clone()
    assert checked.changed(checked.fetch()) == [60, 61, 80]


def test_an_incomplete_write(checked):
    """The last layer never got there, nor the end of the others."""
    checked.pools.host[LAYERS - 1][50:60] = 0
    checked.pools.host[0][120:130] = 0
    assert checked.changed(checked.fetch()) == [*range(50, 60), *range(120, 130)]


def test_a_wrong_index(checked):
    """Rows of others, and rows that nobody ever wrote."""
    checked.pools.host[0][55] = checked.pools.host[0][90]
    assert checked.changed(checked.fetch()) == [55]
    assert checked.fetch(slots(HOST - 20, 20), 200).changed == 20


def test_a_copy_that_went_wrong_on_the_way_back(checked):
    """The host is whole; a row of the device is not."""
    submit = checked.copier._layers
    checked.copier._layers = submit[:-1]
    assert checked.fetch(first=200).changed == 80
    checked.copier._layers = submit
    assert checked.fetch(first=200).changed == 0


def test_a_copy_that_is_repeated(checked):
    """Catches a verdict of the copy that failed, and one that the scheduler's own copy lacks."""
    checked.copier.fail = 1
    assert checked.fetch().changed == 0
    checked.pools.host[1][99] = 3
    checked.copier.fail = 1
    assert checked.changed(checked.fetch()) == [99]
    assert checked.loader.counters.failed == 2


def test_written_anew(checked):
    checked.pools.host[1][99] = 3
    assert checked.fetch().changed == 1
    checked.checksums.rewrite(WRITTEN[40:60], slots(40, 20))
    job = checked.fetch()
    assert job.changed == 0 and checked.pools.holds(job.host_slots, job.device_slots)


def test_unchecked_jobs_are_believed(checked):
    """Without places nobody asks: as everywhere while the flag is off."""
    checked.pools.host[1][99] = 3
    checked.loader.fetch(WRITTEN, slots(100, 80))
    (job,) = collect(checked.loader, 1)
    assert job.changed == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scattered", [False, True], ids=["runs", "scattered"])
def test_on_a_gpu(scattered):
    """Catches a verdict that is read before the check has been done, and one of another job.

    Run by hand on a GPU: ``python -P -m pytest -m gpu tests/unit/test_checksums.py``.
    """
    tokens, jobs = 2000, 12
    host = [torch.randn(tokens * jobs, 8, 128).to(torch.bfloat16).pin_memory() for _ in range(8)]
    device = [layer.cuda() for layer in host]
    checksums = Checksums(host, device)
    everything = torch.arange(tokens * jobs)
    checksums.seal(everything, everything.cuda())
    host[5][tokens * 3 + 7].view(torch.uint8)[3, 100] ^= 1
    host[0][tokens * 8 + 1 : tokens * 8 + 5] = 0
    loader = LoaderClient(
        StreamCopier(host, device, checksums=checksums),
        StreamCopier(host, device, checksums=checksums),
    )
    parts = everything.view(jobs, tokens)
    if scattered:
        parts = torch.stack([part[torch.randperm(tokens)] for part in parts])
    placed = [checksums.places_of(part) for part in parts]
    sealed = torch.cuda.Event()
    sealed.record()
    for part, places in zip(parts, placed, strict=True):
        loader.fetch(part, part.cuda(), (sealed,), places)
    changed = {job.number - 1: job.changed for job in collect(loader, jobs)}
    loader.close()
    assert {n: count for n, count in changed.items() if count} == {3: 1, 8: 4}
