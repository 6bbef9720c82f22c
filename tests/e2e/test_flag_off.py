"""Installed without the flag, the plugin changes nothing."""

from __future__ import annotations

import pytest
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


def settings(info: dict) -> dict:
    """Resolved settings as the info endpoint shows them."""
    merged = info | info["internal_states"][0]
    return {key: value for key, value in merged.items() if key not in VOLATILE}


def test_installed_equals_excluded(tiny_references, logs):
    """Also: with the flag, SGLang resolves everything that is not ours as it would without."""
    reference = tiny_references["flag off"]
    excluded = settings(reference.info)
    with server(reference.model, logs / "installed.log", TINY_FLAGS) as client:
        info = client.info()
        answers = client.run(reference.phases, reference.answers)
    assert "vericache" not in info["internal_states"][0]
    assert not judge(reference.calls, reference.answers, answers).mismatches
    assert all(answer.info is None for answer in answers.values())
    assert settings(info) == excluded
    with server(reference.model, logs / "flagged.log", (*TINY_FLAGS, *DRAFT_FLAGS)) as client:
        flagged = settings(client.info())
    differing = {key for key in excluded | flagged if excluded.get(key) != flagged.get(key)}
    # SGLang reports this average for any speculative algorithm.
    assert differing - {"vericache", "avg_spec_accept_length"} <= OURS, differing
