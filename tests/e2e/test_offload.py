"""The full KV leaves the device: the same tokens from a pool that holds a part of them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from breadth import ANY_END, tokens
from cases import Call, Phase
from compare import Verdict, judge
from conftest import DRAFT_FLAGS, TINY_FLAGS, Reference, make_reference
from metrics import Samples
from servers import server
from test_interruptions import settle

from sglang_vericache.cpu.engine import KERNEL_LIBRARY

pytestmark = pytest.mark.e2e

HORIZON = 6
LENGTHS = tuple(500 + 19 * n for n in range(20))
RUNNING, OUTPUT = len(LENGTHS), 40
NEEDED = sum(LENGTHS) + RUNNING * (OUTPUT + 2 * (HORIZON + 1))
# A pool for the phases of the identity suite: the longest request and a little.
BREADTH_POOL = 4_000
OFFLOAD = (
    *DRAFT_FLAGS,
    *("--vericache-horizon", str(HORIZON), "--vericache-offload", "always"),
    *("--vericache-host-memory", "256MiB", "--chunked-prefill-size", "256"),
)
FAULTS = Path(__file__).parent / "loader_faults"


def together(base) -> list[Phase]:
    calls = [Call(f"offload/{n}", tokens(2000 + n, n), OUTPUT, ANY_END) for n in LENGTHS]
    yield Phase("together", calls, RUNNING, flush_before=True)


@pytest.fixture(scope="module")
def reference(tiny_model, logs) -> Reference:
    return make_reference(tiny_model, TINY_FLAGS, together, logs / "offload-reference.log")


def pool(share: int) -> tuple[str, str]:
    """1/share of what the requests need."""
    return "--max-total-tokens", str(NEEDED // share)


def run(reference: Reference, log: Path, flags, env=None):
    """Verdict and status of a server with offloading."""
    with server(reference.model, log, (*TINY_FLAGS, *OFFLOAD, *flags), env) as client:
        answers = client.run(reference.phases, reference.answers)
        status = settle(client)
    verdict = judge(reference.calls, reference.answers, answers)
    print(f"\n{verdict.summary()}\n{status['offload']}")
    return verdict, status


def assert_same(verdict: Verdict) -> None:
    assert verdict.compared > 0
    assert not verdict.mismatches, "\n".join(verdict.mismatches)
    assert not verdict.problems, "\n".join(verdict.problems)


def assert_rotated(status) -> None:
    """Fetching really happened, and nothing of it is left."""
    offload = status["offload"]
    assert offload["detachments"] > 0 and offload["fetched_tokens"] > 0, offload
    assert offload["attached"] == offload["detached"] == offload["fetching"] == 0
    assert status["requests"] == 0


# Faults, all in one server


@pytest.fixture(scope="module")
def faulty(reference, logs, tmp_path_factory):
    switch = tmp_path_factory.mktemp("fault") / "name"
    switch.write_text("none")
    env = {
        "VERICACHE_LOADER_FAULT": str(switch),
        "PYTHONPATH": os.pathsep.join([str(KERNEL_LIBRARY), str(FAULTS)]),
    }
    log = logs / "offload-faults.log"
    flags = (*TINY_FLAGS, *OFFLOAD, *pool(4), "--enable-metrics", "--log-level", "info")
    with server(reference.model, log, flags, env) as client:
        yield client, switch, log


def under(faulty, reference, name: str):
    """What the counters of offloading gained while the requests ran under a fault."""
    client, switch, _ = faulty
    before = client.status()["offload"]
    switch.write_text(name)
    answers = client.run(reference.phases, reference.answers)
    after = settle(client)["offload"]
    assert_same(judge(reference.calls, reference.answers, answers))
    return {key: after[key] - before[key] for key in after}


def test_late_fetches(faulty, reference):
    """Nothing reads before the bytes are there."""
    gained = under(faulty, reference, "late")
    assert gained["fetches"] > 0 and gained["failed"] == 0


def test_failing_fetches(faulty, reference):
    gained = under(faulty, reference, "some fail")
    assert gained["failed"] > 0 and gained["fetches"] > gained["failed"]


def test_aborts_while_fetches_are_under_way(faulty, reference):
    """Clients go away in every state; the others' tokens stay the same, and nothing is left."""
    client, switch, _ = faulty
    switch.write_text("late")
    survivors = reference.calls[::2]
    victims = reference.calls[1::2]
    client.flush()
    with ThreadPoolExecutor(RUNNING) as threads:
        running = [threads.submit(client.call, call) for call in survivors]
        for n, call in enumerate(victims):
            threads.submit(abort_soon, client, call, 0.2 + 0.15 * n)
        answers = {a.name: a for a in (future.result() for future in running)}
    assert_same(judge(survivors, reference.answers, answers))
    status = settle(client)
    assert_rotated(status)
    client.flush()
    assert client.status()["draft_pool"]["used_tokens"] == 0


def abort_soon(client, call: Call, after_s: float) -> None:
    """Stream a request; hang up after so many seconds."""
    body = call.body() | {"stream": True, "rid": f"victim-{call.name}-{time.monotonic()}"}
    body["sampling_params"]["max_new_tokens"] = 400
    with requests.post(client.url + "/generate", json=body, stream=True, timeout=120) as response:
        deadline = time.monotonic() + after_s
        for _ in response.iter_lines():
            if time.monotonic() > deadline:
                break


def test_no_message_arrives(faulty, reference):
    """Dropping every message stops the loader's fetches and costs time only."""
    gained = under(faulty, reference, "no messages")
    assert gained["late"] > 0


def test_the_loader_is_killed(faulty, reference):
    """The server goes on with everything attached, and says so."""
    client, _, log = faulty
    under(faulty, reference, "killed")
    gained = under(faulty, reference, "killed")
    assert gained["detachments"] == 0 and not client.status()["offload"]["active"]
    assert "The loader thread of --vericache-offload is lost" in log.read_text(errors="replace")
    samples = Samples(client.url)
    assert samples.value("sglang:vericache_offload_active") == 0
    assert samples.value("sglang:vericache_offload_fetched_bytes_total") > 0
    assert samples.by("sglang:vericache_offload_fetches_total", "end")["failed"] > 0


# A server each


def test_retraction_without_overlap_scheduling(reference, logs):
    """Retracted every few steps in whatever state they are, on the Python tree core, with tails
    that go to the tree early."""
    verdict, status = run(
        reference,
        logs / "offload-retract.log",
        (*pool(4), "--disable-overlap-schedule", "--vericache-fold-tail", "70"),
        {
            "SGLANG_TEST_RETRACT": "1",
            "SGLANG_TEST_RETRACT_INTERVAL": "13",
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
        },
    )
    assert_same(verdict)
    assert_rotated(status)


@pytest.mark.long
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "synchronous"])
def test_every_scenario(tiny_reference, logs, overlap):
    """The whole identity suite with requests that come and go: features that are decoded plainly,
    prefixes, turns, stops, streams."""
    flags = ("--max-total-tokens", str(BREADTH_POOL))
    flags += () if overlap else ("--disable-overlap-schedule",)
    verdict, status = run(tiny_reference, logs / f"offload-breadth-{overlap}.log", flags)
    assert_same(verdict)
    assert_rotated(status)


def test_a_full_host_pool(reference, logs):
    """The host holds less than the device: most requests cannot be detached, and all get there."""
    flags = (*pool(2), "--vericache-host-memory", "8MiB")
    verdict, status = run(reference, logs / "offload-host.log", flags)
    assert_same(verdict)
    assert status["requests"] == 0 and status["offload"]["active"]


@pytest.mark.parametrize("share", [2, 4, 8])
def test_a_part_of_the_pool(reference, logs, share):
    """The pool holds 1/share of what the running requests need."""
    verdict, status = run(reference, logs / f"offload-{share}.log", pool(share))
    assert_same(verdict)
    assert_rotated(status)
    assert verdict.rounds > 0 and verdict.accepted > 0
    offload = status["offload"]
    assert offload["active"] and offload["failed"] == offload["late"] == 0
