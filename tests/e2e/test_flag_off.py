"""Installed without the flag, the plugin changes nothing."""

from __future__ import annotations

import pytest
from breadth import ANY_END, tokens
from cases import ANYTHING, Call, Phase
from compare import judge
from conftest import DRAFT_FLAGS, TINY_FLAGS
from servers import server

pytestmark = pytest.mark.e2e

# What differs between any two starts.
VOLATILE = {
    *("port", "random_seed", "nccl_port", "instance_id", "launch_command", "startup_time"),
    *("last_gen_throughput", "memory_usage", "host_name", "internal_states"),
    *("max_total_num_tokens", "gated_launch_port"),
}
# What the flag is allowed to set.
OURS = {
    *("speculative_algorithm", "speculative_num_steps", "speculative_eagle_topk"),
    *("speculative_num_draft_tokens", "radix_cache_backend"),
}


def phases(base):
    prompts = {f"off/{n}": tokens(2000 + n, n) for n in (40, 300, 900)}
    calls = [Call(name, prompt, 40, ANY_END, expect=ANYTHING) for name, prompt in prompts.items()]
    yield Phase("flag off", calls, 3)


def settings(client) -> dict:
    """Resolved settings as the info endpoint shows them."""
    info = client.info()
    merged = info | info["internal_states"][0]
    return {key: value for key, value in merged.items() if key not in VOLATILE}


def test_installed_equals_excluded(tiny_model, logs):
    """Also: with the flag, SGLang resolves everything that is not ours as it would without."""
    reference: dict = {}
    with server(
        tiny_model, logs / "excluded.log", TINY_FLAGS, plugin=False, with_gaps=True
    ) as client:
        client.run(phases, reference)
        excluded = settings(client)
    calls = [call for phase in phases(reference) for call in phase.calls]
    with server(tiny_model, logs / "installed.log", TINY_FLAGS) as client:
        answers = client.run(phases, reference)
        installed = settings(client)
        assert "vericache" not in client.info()["internal_states"][0]
    assert not judge(calls, reference, answers).mismatches
    assert all(answer.info is None for answer in answers.values())
    assert installed == excluded
    with server(tiny_model, logs / "flagged.log", (*TINY_FLAGS, *DRAFT_FLAGS)) as client:
        flagged = settings(client)
    differing = {key for key in excluded | flagged if excluded.get(key) != flagged.get(key)}
    # SGLang reports this average for any speculative algorithm.
    assert differing - {"vericache", "avg_spec_accept_length"} <= OURS, differing
