"""A server whose attention backend is asked as FlashAttention is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from compare import judge
from conftest import DRAFT_FLAGS, TINY_FLAGS
from servers import server

from sglang_vericache.cpu.engine import KERNEL_LIBRARY

pytestmark = pytest.mark.e2e

BACKEND = Path(__file__).parent / "device_backend"


def test_a_backend_without_host_lengths_and_with_one_width(tiny_references, logs):
    """Catches committed lengths that only some backends make SGLang bring to the host, and passes
    narrower than what FlashAttention reads of every request."""
    reference = tiny_references["mutations"]
    env = {"PYTHONPATH": os.pathsep.join([str(KERNEL_LIBRARY), str(BACKEND)])}
    flags = (*TINY_FLAGS, *DRAFT_FLAGS, "--vericache-horizon", "8")
    with server(reference.model, logs / "device-backend.log", flags, env) as client:
        verdict = judge(
            reference.calls,
            reference.answers,
            client.run(reference.phases, reference.answers),
        )
    assert not verdict.mismatches and not verdict.problems, verdict.summary()
    assert verdict.rounds > 0 and verdict.accepted_per_round > 0
