"""A loader thread that fails in every way: time is lost, and no token."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compare import judge
from conftest import TINY_FLAGS
from metrics import Samples
from rotation_load import OFFLOAD, RUNNING, abort_soon, assert_rotated, assert_same, pool
from servers import server
from test_interruptions import settle

from sglang_vericache.cpu.engine import KERNEL_LIBRARY

pytestmark = pytest.mark.e2e

FAULTS = Path(__file__).parent / "loader_faults"


@pytest.fixture(scope="module")
def faulty(offload_reference, logs, tmp_path_factory):
    switch = tmp_path_factory.mktemp("fault") / "name"
    switch.write_text("none")
    env = {
        "VERICACHE_LOADER_FAULT": str(switch),
        "PYTHONPATH": os.pathsep.join([str(KERNEL_LIBRARY), str(FAULTS)]),
    }
    log = logs / "offload-faults.log"
    flags = (*TINY_FLAGS, *OFFLOAD, *pool(4), "--enable-metrics", "--log-level", "info")
    flags += ("--vericache-offload-checksums", "on")
    with server(offload_reference.model, log, flags, env) as client:
        yield client, switch, log


def under(faulty, offload_reference, name: str):
    """What the counters of offloading gained while the requests ran under a fault."""
    client, switch, _ = faulty
    before = client.status()["offload"]
    switch.write_text(name)
    answers = client.run(offload_reference.phases, offload_reference.answers)
    after = settle(client)["offload"]
    assert_same(judge(offload_reference.calls, offload_reference.answers, answers))
    return {key: after[key] - before[key] for key in after}


def test_late_fetches(faulty, offload_reference):
    """Nothing reads before the bytes are there."""
    gained = under(faulty, offload_reference, "late")
    assert gained["fetches"] > 0 and gained["failed"] == 0


def test_failing_fetches(faulty, offload_reference):
    gained = under(faulty, offload_reference, "some fail")
    assert gained["failed"] > 0 and gained["fetches"] > gained["failed"]


def test_what_arrives_as_it_was_written_is_believed(faulty, offload_reference):
    """Catches checksums that do not follow what is written: every fetch would be computed again."""
    gained = under(faulty, offload_reference, "none")
    assert gained["fetches"] > 0 and gained["corrupt"] == gained["recomputed_tokens"] == 0


def test_host_memory_is_overwritten(faulty, offload_reference):
    """In the middle of the run: what comes back changed is never read, but computed again, in
    several pieces where it is longer than a prefill may be."""
    client, _, log = faulty
    gained = under(faulty, offload_reference, "overwritten")
    assert gained["detachments"] > 0 and gained["corrupt"] > 0, gained
    assert gained["recomputed_tokens"] > 256 * gained["corrupt"], gained
    samples = Samples(client.url)
    corrupt = client.status()["offload"]["corrupt"]
    assert samples.value("sglang:vericache_offload_corrupt_fetches_total") == corrupt
    assert "is not what was written there" in log.read_text(errors="replace")


def test_aborts_while_fetches_are_under_way(faulty, offload_reference):
    """Clients go away in every state; the others' tokens stay the same, and nothing is left."""
    client, switch, _ = faulty
    switch.write_text("late")
    survivors = offload_reference.calls[::2]
    victims = offload_reference.calls[1::2]
    client.flush()
    with ThreadPoolExecutor(RUNNING) as threads:
        running = [threads.submit(client.call, call) for call in survivors]
        for n, call in enumerate(victims):
            threads.submit(abort_soon, client, call, 0.2 + 0.15 * n)
        answers = {a.name: a for a in (future.result() for future in running)}
    assert_same(judge(survivors, offload_reference.answers, answers))
    status = settle(client)
    assert_rotated(status)
    client.flush()
    assert client.status()["draft_pool"]["used_tokens"] == 0


def test_no_message_arrives(faulty, offload_reference):
    """Dropping every message stops the loader's fetches and costs time only."""
    gained = under(faulty, offload_reference, "no messages")
    assert gained["late"] > 0


def test_the_loader_is_killed(faulty, offload_reference):
    """The server goes on with everything attached, and says so."""
    client, _, log = faulty
    under(faulty, offload_reference, "killed")
    gained = under(faulty, offload_reference, "killed")
    assert gained["detachments"] == 0 and not client.status()["offload"]["active"]
    assert "The loader thread of --vericache-offload is lost" in log.read_text(errors="replace")
    samples = Samples(client.url)
    assert samples.value("sglang:vericache_offload_active") == 0
    assert samples.value("sglang:vericache_offload_fetched_bytes_total") > 0
    assert samples.by("sglang:vericache_offload_fetches_total", "end")["failed"] > 0
