"""Requests that need several times the pool, and what must hold of a server that serves them."""

from __future__ import annotations

import time

import requests
from breadth import ANY_END, BY_RATIO, MIN_CONTEXT, tokens
from cases import Call, Phase
from compare import Verdict

HORIZON = 6
LENGTHS = tuple(500 + 19 * n for n in range(20))
RUNNING, OUTPUT = len(LENGTHS), 40
NEEDED = sum(LENGTHS) + RUNNING * (OUTPUT + 2 * (HORIZON + 1))
# A pool for the phases of the identity suite: the longest request and a little.
BREADTH_POOL = 4_000
ROTATING = (
    *("--vericache-offload", "always", "--vericache-host-memory", "256MiB"),
    *("--chunked-prefill-size", "256"),
)
# The order of a GPU's steps.
AHEAD = ("--vericache-draft-ahead", "on")
OFFLOAD = (
    *("--enable-vericache", "--vericache-min-context", str(MIN_CONTEXT), *BY_RATIO),
    *("--vericache-horizon", str(HORIZON), *ROTATING),
)


def together(base) -> list[Phase]:
    calls = [Call(f"offload/{n}", tokens(2000 + n, n), OUTPUT, ANY_END) for n in LENGTHS]
    yield Phase("together", calls, RUNNING, flush_before=True)


def pool(share: int) -> tuple[str, str]:
    """1/share of what the requests need."""
    return "--max-total-tokens", str(NEEDED // share)


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


def abort_soon(client, call: Call, after_s: float) -> None:
    """Stream a request; hang up after so many seconds."""
    body = call.body() | {"stream": True, "rid": f"victim-{call.name}-{time.monotonic()}"}
    body["sampling_params"]["max_new_tokens"] = 400
    with requests.post(client.url + "/generate", json=body, stream=True, timeout=120) as response:
        deadline = time.monotonic() + after_s
        for _ in response.iter_lines():
            if time.monotonic() > deadline:
                break
