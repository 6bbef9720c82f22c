"""SGLang's own hierarchical cache beside drafting, without offloading."""

from __future__ import annotations

from dataclasses import replace

import pytest
from compare import judge
from conftest import DRAFT_FLAGS, TINY_FLAGS
from metrics import Samples
from rotation_load import assert_same, pool
from servers import server

pytestmark = pytest.mark.e2e

HOST_CACHE = (
    *("--enable-hierarchical-cache", "--hicache-size", "1"),
    *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
)


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_prompts_that_come_back_from_the_host(offload_reference, logs, policy):
    """Catches a span built, or a verification made, before a prompt's KV is back."""
    reference = offload_reference

    def unflushed(base):
        return (replace(phase, flush_before=False) for phase in reference.phases(base))

    flags = (*TINY_FLAGS, *DRAFT_FLAGS, *pool(4), *HOST_CACHE, "--enable-metrics")
    flags += ("--hicache-write-policy", policy, "--vericache-horizon", "6")
    with server(reference.model, logs / f"host-{policy}.log", flags) as client:
        first = client.run(unflushed, reference.answers)
        before = Samples(client.url).value("sglang:load_back_tokens_total")
        again = client.run(unflushed, reference.answers)
        loaded = Samples(client.url).value("sglang:load_back_tokens_total") - before
        status = client.status()
    for answers in (first, again):
        verdict = judge(reference.calls, reference.answers, answers)
        print(f"\n{verdict.summary()}, {loaded:.0f} tokens from the host")
        assert_same(verdict)
        assert verdict.rounds > 0 and verdict.accepted > 0
    assert loaded > sum(len(call.prompt) for call in reference.calls) / 2
    assert sum(answer.cached_tokens for answer in again.values()) >= loaded
    assert status["requests"] == 0 and status["spans"]["reused"] > 0
    assert status["cached_prefills"] > 0
    assert not status["offload"]["active"]
