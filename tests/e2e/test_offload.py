"""The full KV leaves the device: the same tokens from a pool that holds a part of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from breadth import ANY_END, tokens
from cases import Call, Phase
from compare import Verdict, judge
from conftest import DRAFT_FLAGS, TINY_FLAGS, Reference, make_reference
from servers import server

pytestmark = pytest.mark.e2e

HORIZON = 6
LENGTHS = tuple(500 + 19 * n for n in range(20))
RUNNING, OUTPUT = len(LENGTHS), 40
NEEDED = sum(LENGTHS) + RUNNING * (OUTPUT + 2 * (HORIZON + 1))
FLAGS = (
    *DRAFT_FLAGS,
    *("--vericache-horizon", str(HORIZON), "--vericache-offload", "always"),
    *("--vericache-host-memory", "256MiB", "--chunked-prefill-size", "256"),
)


def together(base) -> list[Phase]:
    calls = [Call(f"offload/{n}", tokens(2000 + n, n), OUTPUT, ANY_END) for n in LENGTHS]
    yield Phase("together", calls, RUNNING)


@pytest.fixture(scope="module")
def reference(tiny_model, logs) -> Reference:
    return make_reference(tiny_model, TINY_FLAGS, together, logs / "offload-reference.log")


def run(reference: Reference, log: Path, share: int, flags=(), env=None):
    """Verdict and status of a server whose pool holds 1/share of what the requests need."""
    pool = ("--max-total-tokens", str(NEEDED // share))
    with server(reference.model, log, (*pool, *FLAGS, *flags), env) as client:
        answers = client.run(reference.phases, reference.answers)
        status = client.status()
    verdict = judge(reference.calls, reference.answers, answers)
    print(f"\n1/{share}: {verdict.summary()}\n{status['offload']}")
    return verdict, status


def assert_same(verdict: Verdict) -> None:
    assert verdict.compared > 0
    assert not verdict.mismatches, "\n".join(verdict.mismatches)
    assert not verdict.problems, "\n".join(verdict.problems)


@pytest.mark.parametrize("share", [2, 4, 8])
def test_a_part_of_the_pool(reference, logs, share):
    verdict, status = run(reference, logs / f"offload-{share}.log", share)
    assert_same(verdict)
    offload = status["offload"]
    assert offload["detachments"] > 0 and offload["fetched_tokens"] > 0
    assert offload["active"] and offload["failed"] == offload["late"] == 0
    assert status["requests"] == 0
    assert offload["attached"] == offload["detached"] == offload["fetching"] == 0
