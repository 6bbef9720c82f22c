"""Requests that end in the middle of a round, and caches flushed between."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from compare import judge
from conftest import DRAFT_FLAGS, TINY_FLAGS
from servers import server
from short_phases import SURVIVORS, VICTIM

pytestmark = pytest.mark.e2e

# Staggering makes most of a request's time "drafted, not verified".
FLAGS = (*TINY_FLAGS, *DRAFT_FLAGS, "--vericache-horizon", "8", "--vericache-stagger", "2")


def start_victim(client, rid: str):
    """A streaming request, read up to its third chunk."""
    body = VICTIM.body() | {"stream": True, "rid": rid}
    response = requests.post(client.url + "/generate", json=body, stream=True, timeout=60)
    lines = (line for line in response.iter_lines() if line)
    return response, [next(lines) for _ in range(3)]


def settle(client) -> dict:
    """Status when nothing runs any more."""
    for _ in range(100):
        status = client.status()
        if status["requests"] == 0:
            return status
        time.sleep(0.2)
    raise AssertionError(f"a request is still there: {status}")


def test_disconnect_abort_and_flush(tiny_references, logs):
    """What an interrupted request held is given back, and its neighbours notice nothing."""
    reference = tiny_references["interruptions"]
    with server(reference.model, logs / "interruptions.log", FLAGS) as client:
        for how in ("disconnect", "abort", "abort while drafting"):
            with ThreadPoolExecutor(4) as pool:
                running = [pool.submit(client.call, call) for call in SURVIVORS]
                response, chunks = start_victim(client, rid=f"victim-{how}")
                assert chunks
                if how == "disconnect":
                    response.close()
                else:
                    requests.post(client.url + "/abort_request", json={"rid": f"victim-{how}"})
                answers = {a.name: a for a in (future.result() for future in running)}
                response.close()
            verdict = judge(SURVIVORS, reference.answers, answers)
            assert not verdict.mismatches and not verdict.problems, (how, verdict)
            assert verdict.accepted > 0
            status = settle(client)
            assert status["draft_pool"]["used_tokens"] == status["spans"]["owned_tokens"], how
            client.flush()
            status = client.status()
            assert status["spans"]["owned"] == 0, how
            assert status["draft_pool"]["used_tokens"] == 0, how
        answers = client.run(reference.phases, reference.answers)
        verdict = judge(reference.calls, reference.answers, answers)
        assert not verdict.mismatches and not verdict.problems, verdict
