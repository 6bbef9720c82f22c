"""The loader thread and the scheduler's side of it: what is lost costs time, nothing else."""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest
import torch
from loader_fakes import FaultyCopier, Pools, client, collect, slots, wait_for

from sglang_vericache.loader import client as client_module
from sglang_vericache.loader.channel import Channel
from sglang_vericache.loader.job import Job, Stage
from sglang_vericache.loader.messages import (
    Cancel,
    Done,
    Fetch,
    Heartbeat,
)
from sglang_vericache.loader.runs import Run, runs_of, starts_of


@pytest.fixture
def pools() -> Pools:
    return Pools()


@pytest.fixture
def copier(pools) -> FaultyCopier:
    return FaultyCopier(pools)


@pytest.fixture
def loader(pools, copier):
    made = client(pools, copier)
    yield made
    copier.gate.set()
    made.close()
    assert not made._thread.is_alive(), "the thread outlives its client"


# Jobs


def test_one_side_wins():
    """Catches a job that is copied although it was withdrawn, its rows long somebody else's."""
    for _ in range(200):
        job = Job(1, slots(0, 3), slots(0, 3))
        won: list[str] = []
        sides = [
            threading.Thread(target=lambda j=job, w=won: j.begin() and w.append("begin")),
            threading.Thread(target=lambda j=job, w=won: j.withdraw() and w.append("withdraw")),
        ]
        random.shuffle(sides)
        for side in sides:
            side.start()
        for side in sides:
            side.join()
        assert len(won) == 1
        assert job.stage is (Stage.COPYING if won == ["begin"] else Stage.WITHDRAWN)


def test_a_job_ends_once():
    job = Job(1, slots(0, 3), slots(0, 3))
    with pytest.raises(AssertionError, match="ends while waiting"):
        job.end()
    assert job.begin() and not job.begin() and not job.withdraw()
    job.end(failed=True)
    assert job.retry() and job.begin()
    job.end()
    assert job.stage is Stage.DONE and not job.retry()


@pytest.mark.parametrize("seed", range(20))
def test_runs_cover_every_row(seed):
    """Property: the runs say the same pairs in the same order, as few as possible."""
    rng = random.Random(seed)
    host, device = [], []
    for _ in range(rng.randrange(6)):
        count = rng.randint(1, 9)
        a, b = rng.randrange(100), rng.randrange(100)
        host += range(a, a + count)
        device += range(b, b + count)
    both = torch.tensor(host, dtype=torch.int64), torch.tensor(device, dtype=torch.int64)
    runs = runs_of(*both, starts_of(*both))
    pairs = [(r.host + i, r.device + i) for r in runs for i in range(r.count)]
    assert pairs == list(zip(host, device, strict=True))
    for a, b in itertools.pairwise(runs):
        assert (a.host + a.count, a.device + a.count) != (b.host, b.device)


def test_one_run_for_a_whole_path():
    both = slots(7, 100), slots(3, 100)
    assert runs_of(*both, starts_of(*both)) == [Run(7, 3, 100)]


# The thread


def test_copies_in_order(pools, copier, loader):
    """What is told first is copied first, several at a time."""
    copier.gate.clear()
    jobs = [loader.fetch(slots(10 * n, 10), slots(20 * n, 10)) for n in range(9)]
    copier.gate.set()
    assert sorted(j.number for j in collect(loader, 9)) == [j.number for j in jobs]
    assert copier.order == [10 * n for n in range(9)]
    assert max(copier.submissions) > 1, "one submission a job"
    assert all(pools.holds(j.host_slots, j.device_slots) for j in jobs)
    counters = loader.counters
    assert (counters.fetches, counters.tokens) == (9, 90)
    assert counters.bytes == 90 * pools.host[0][0].nbytes * len(pools.host)
    assert loader.under_way == 0 and loader.poll() == []


def test_a_withdrawn_job_is_never_copied(pools, copier, loader):
    """Its rows may be somebody else's by then."""
    copier.gate.clear()
    blocker = loader.fetch(slots(0, 5), slots(0, 5))
    wait_for(lambda: blocker.stage is Stage.COPYING)
    job = loader.fetch(slots(50, 5), slots(50, 5))
    assert loader.cancel(job) and not loader.cancel(job)
    assert not loader.cancel(blocker), "a copy under way cannot be taken back"
    copier.gate.set()
    collect(loader, 1)
    time.sleep(0.05)
    assert copier.order == [0]
    assert all((layer[50:55] == -1).all() for layer in pools.device)
    assert loader.counters.cancelled == 1


def test_finish_waits_for_one(pools, copier, loader):
    copier.delay_s = 0.05
    first = loader.fetch(slots(0, 5), slots(0, 5))
    second = loader.fetch(slots(5, 5), slots(5, 5))
    loader.finish(second)
    assert pools.holds(second.host_slots, second.device_slots)
    assert collect(loader, 1) == [first]


def test_drain_leaves_nothing(pools, copier, loader):
    copier.delay_s = 0.02
    jobs = [loader.fetch(slots(5 * n, 5), slots(5 * n, 5)) for n in range(20)]
    assert loader.drain() == jobs
    stages = {job.stage for job in jobs}
    assert stages <= {Stage.DONE, Stage.WITHDRAWN} and Stage.WITHDRAWN in stages
    for layer in pools.device:
        layer.fill_(-1)
    time.sleep(0.1)
    assert pools.untouched, "something was copied after the drain"


# Faults


def test_every_message_is_dropped(pools, copier, monkeypatch):
    """Fetches by the loader stop; the scheduler copies itself, later."""
    monkeypatch.setattr(Channel, "send", lambda self, message: None)
    loader = client(pools, copier, patience_s=0.1, silence_s=60)
    jobs = [loader.fetch(slots(10 * n, 10), slots(10 * n, 10)) for n in range(5)]
    began = time.monotonic()
    assert sorted(j.number for j in collect(loader, 5)) == [j.number for j in jobs]
    assert time.monotonic() - began >= 0.09
    assert copier.order == [] and loader.counters.late == 5
    assert all(pools.holds(j.host_slots, j.device_slots) for j in jobs)
    loader._thread._stopped = True  # the message that would end it is dropped as well
    loader.close()


@pytest.mark.parametrize("lost", [Done, Heartbeat, Fetch, Cancel])
def test_one_kind_of_message_is_dropped(pools, copier, monkeypatch, lost):
    send = Channel.send
    monkeypatch.setattr(
        Channel, "send", lambda self, m: None if isinstance(m, lost) else send(self, m)
    )
    loader = client(pools, copier, patience_s=0.1, silence_s=60)
    jobs = [loader.fetch(slots(10 * n, 10), slots(10 * n, 10)) for n in range(5)]
    collect(loader, 5)
    assert all(pools.holds(j.host_slots, j.device_slots) for j in jobs)
    loader.close()


def test_a_copy_that_fails_is_repeated(pools, copier, loader, caplog):
    copier.fail = 2
    jobs = [loader.fetch(slots(0, 5), slots(0, 5))]
    collect(loader, 1)
    jobs.append(loader.fetch(slots(5, 5), slots(5, 5)))
    collect(loader, 1)
    assert all(pools.holds(j.host_slots, j.device_slots) for j in jobs)
    assert loader.counters.failed == 2 and loader.alive
    wait_for(lambda: loader.poll() == [] and "the link is cut" in caplog.text)


def test_the_thread_dies(pools, copier, loader, caplog):
    """What it had and what comes later arrives; the log says so once, and nobody asks it again."""
    copier.die = True
    copier.gate.clear()
    jobs = [loader.fetch(slots(10 * n, 10), slots(10 * n, 10)) for n in range(6)]
    wait_for(lambda: jobs[0].stage is Stage.COPYING)
    assert loader.alive
    copier.gate.set()
    assert sorted(j.number for j in collect(loader, 6)) == [j.number for j in jobs]
    assert all(pools.holds(j.host_slots, j.device_slots) for j in jobs)
    assert not loader.alive and not loader.alive
    assert caplog.text.count("is lost (it has ended)") == 1
    late = loader.fetch(slots(100, 5), slots(100, 5))
    assert collect(loader, 1) == [late] and pools.holds(late.host_slots, late.device_slots)


def test_the_thread_hangs(pools, copier, caplog):
    """Jobs that it has not begun are copied by the scheduler; the one in its hands is waited
    for, because it may still write."""
    copier.gate.clear()
    loader = client(pools, copier, patience_s=0.05, silence_s=0.3)
    held = loader.fetch(slots(0, 1), slots(0, 1))
    wait_for(lambda: held.stage is Stage.COPYING)
    waiting = loader.fetch(slots(40, 5), slots(40, 5))
    assert collect(loader, 1) == [waiting] and loader.counters.late == 1
    wait_for(lambda: not loader.alive)
    assert "no sign of life" in caplog.text
    assert held.stage is Stage.COPYING
    copier.gate.set()
    assert collect(loader, 1) == [held]
    loader.close()


class Link(FaultyCopier):
    """Copies that have begun and do not arrive while the link is slow."""

    slow = True

    def arrived(self, job) -> bool:
        return not self.slow


def test_a_busy_link_is_not_lost(pools):
    """Catches a scheduler that copies, and waits for, what only stands in line: paths of long
    contexts take a good part of a second each."""
    copier = Link(pools)
    loader = client(pools, copier, patience_s=0.05)
    jobs = [loader.fetch(slots(10 * n, 10), slots(20 * n, 10)) for n in range(9)]
    wait_for(lambda: jobs[1].stage is Stage.COPYING)
    for _ in range(20):
        assert not loader.poll(0.01)
    assert loader.counters.late == 0 and jobs[8].stage is Stage.WAITING
    copier.slow = False
    assert len(collect(loader, 9)) == 9 and loader.counters.late == 0
    loader.close()


def test_a_job_that_was_overtaken_is_lost(pools, monkeypatch):
    """Catches a lost message behind which the link never rests."""
    copier, send, sent = Link(pools), Channel.send, []

    def lose_the_first(channel, message) -> None:
        lost = isinstance(message, Fetch) and not sent
        sent.append(message) if isinstance(message, Fetch) else None
        return None if lost else send(channel, message)

    monkeypatch.setattr(Channel, "send", lose_the_first)
    loader = client(pools, copier, patience_s=0.05)
    first = loader.fetch(slots(0, 10), slots(0, 10))
    others = [loader.fetch(slots(10 * n, 10), slots(20 * n, 10)) for n in (1, 2)]
    wait_for(lambda: others[1].stage is Stage.COPYING)
    assert collect(loader, 1) == [first] and loader.counters.late == 1
    copier.slow = False
    collect(loader, 2)
    loader.close()


def test_silence_alone_is_no_death(pools, copier, monkeypatch):
    """Nothing is under way: an idle loader that was not heard for long is still asked."""
    loader = client(pools, copier, silence_s=0.01)
    time.sleep(0.1)
    assert loader.alive
    loader.close()


@pytest.mark.parametrize("seed", range(15))
def test_anything_goes(seed, pools, copier, monkeypatch):
    """Property: whatever is lost, fails or is withdrawn, each job arrives whole or not at all."""
    rng = random.Random(seed)
    send = Channel.send
    monkeypatch.setattr(
        Channel, "send", lambda self, m: None if rng.random() < 0.3 else send(self, m)
    )
    monkeypatch.setattr(client_module.logger, "warning", lambda *_: None)
    copier.delay_s = 0.002
    loader = client(pools, copier, patience_s=0.03, silence_s=60)
    free = list(range(0, 300, 10))
    jobs, arrived = [], []
    for _ in range(60):
        if free and rng.random() < 0.6:
            place = free.pop(rng.randrange(len(free)))
            for layer in pools.device:
                layer[place : place + 10] = -1
            job = loader.fetch(slots(rng.randrange(390), 10), slots(place, 10))
            jobs.append(job)
        copier.fail = int(rng.random() < 0.1)
        if jobs and rng.random() < 0.2:
            job = rng.choice(jobs)
            if loader.cancel(job):
                jobs.remove(job)
                place = int(job.device_slots[0])
                assert all((layer[place : place + 10] == -1).all() for layer in pools.device)
                free.append(place)
        for job in loader.poll(0.002):
            assert pools.holds(job.host_slots, job.device_slots)
            arrived.append(job)
            jobs.remove(job)
            free.append(int(job.device_slots[0]))
    copier.fail = 0
    for job in collect(loader, len(jobs)):
        assert pools.holds(job.host_slots, job.device_slots)
    assert arrived and loader.under_way == 0
    loader._thread._stopped = True
    loader.close()


def test_in_a_hurry(pools, copier, loader):
    """Catches a prefill that waits for everything that was ordered before its prefix, and one that
    is copied twice."""
    copier.gate.clear()
    first = loader.fetch(slots(0, 10), slots(0, 10))
    wait_for(lambda: first.stage is Stage.COPYING)
    second = loader.fetch(slots(20, 10), slots(20, 10))
    loader.finish(second, hurry=True)
    assert first.stage is Stage.COPYING and pools.holds(slots(20, 10), slots(20, 10))
    assert loader.counters.late == 0
    copier.gate.set()
    assert collect(loader, 1) == [first]
    loader.finish(loader.fetch(slots(40, 5), slots(40, 5)))
    assert copier.order == [0, 40] and loader.counters.fetches == 3
