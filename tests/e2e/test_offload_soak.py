"""Half an hour of mixed load on requests that come and go, with SGLang's strictest checks."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from breadth import ANY_END, tokens
from cases import Call
from compare import judge
from conftest import TINY_FLAGS
from rotation_load import AHEAD, OFFLOAD, abort_soon, assert_rotated, assert_same, pool
from servers import server
from test_interruptions import settle

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SOAK_S, CLIENTS = 1_800, 12
# Growth of resident memory between the first and the last third that is not called a leak.
MOST_GROWTH = 1.03


def resident() -> int:
    """Memory of the server, which is all that this process has started."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def test_half_an_hour(tiny_model, logs, offload_reference):
    """Every answer is the reference's, nothing is left between the waves, and memory stays."""
    reference = offload_reference
    rng, sizes = random.Random(5), []
    flags = (*TINY_FLAGS, *OFFLOAD, *AHEAD, *pool(4))
    with server(tiny_model, logs / "soak.log", flags) as client:
        ends = time.monotonic() + SOAK_S
        while time.monotonic() < ends:
            calls = rng.sample(reference.calls, rng.randint(6, len(reference.calls)))
            victims = [
                Call(f"soak/{n}", tokens(rng.randrange(10**6), rng.randint(300, 900)), 200, ANY_END)
                for n in range(rng.randint(0, 6))
            ]
            if rng.random() < 0.3:
                client.flush()
            with ThreadPoolExecutor(CLIENTS) as threads:
                running = [threads.submit(client.call, call) for call in calls]
                for victim in victims:
                    threads.submit(abort_soon, client, victim, rng.uniform(0.1, 3.0))
                answers = {a.name: a for a in (future.result() for future in running)}
            assert_same(judge(calls, reference.answers, answers))
            status = settle(client)
            sizes.append(resident())
        assert_rotated(status)
        assert status["rounds_ahead"] > 0
    third = len(sizes) // 3
    assert third > 3, "too few waves to tell a slope"
    first, last = sizes[third // 2 : third], sizes[-third:]  # the very first still fill pools
    assert sum(last) / len(last) <= MOST_GROWTH * sum(first) / len(first), sizes
    assert threading.active_count() < 10
