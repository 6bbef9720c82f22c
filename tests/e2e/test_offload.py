"""The full KV leaves the device: the same tokens from a pool that holds a part of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from compare import judge
from conftest import TINY_FLAGS, Reference
from rotation_load import (
    AHEAD,
    BREADTH_POOL,
    HORIZON,
    LENGTHS,
    OFFLOAD,
    assert_rotated,
    assert_same,
    pool,
)
from servers import server
from test_interruptions import settle

from sglang_vericache.cpu.engine import KERNEL_LIBRARY

pytestmark = pytest.mark.e2e

EARLY_PROMPTS = Path(__file__).parent / "early_prompts"


def run(reference: Reference, log: Path, flags, env=None):
    """Verdict and status of a server with offloading."""
    with server(reference.model, log, (*TINY_FLAGS, *OFFLOAD, *flags), env) as client:
        answers = client.run(reference.phases, reference.answers)
        status = settle(client)
    verdict = judge(reference.calls, reference.answers, answers)
    print(f"\n{verdict.summary()}\n{status['offload']}")
    return verdict, status


def test_retraction_without_overlap_scheduling(offload_reference, logs):
    """Retracted every few steps in whatever state they are, on the Python tree core."""
    verdict, status = run(
        offload_reference,
        logs / "offload-retract.log",
        (*pool(4), "--disable-overlap-schedule"),
        {
            "SGLANG_TEST_RETRACT": "1",
            "SGLANG_TEST_RETRACT_INTERVAL": "13",
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
        },
    )
    assert_same(verdict)
    assert_rotated(status)


def test_drafting_ahead_whenever_nobody_is_away(offload_reference, logs):
    """The order of a GPU's steps: those that run before memory is short draft ahead, and those that
    are left in the end do so again."""
    verdict, status = run(
        offload_reference,
        logs / "offload-ahead.log",
        (*pool(3), *AHEAD),
        {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "29"},
    )
    assert_same(verdict)
    assert_rotated(status)
    assert status["rounds_ahead"] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="overlap"),
        pytest.param(("--disable-overlap-schedule",), id="synchronous"),
        pytest.param((*AHEAD, "--vericache-fold-tail", "70"), id="ahead"),
    ],
)
def test_every_scenario(tiny_reference, logs, more):
    """The whole identity suite with requests that come and go: features that are decoded plainly,
    prefixes, turns, stops, streams."""
    flags = ("--max-total-tokens", str(BREADTH_POOL), *more)
    log = logs / f"offload-breadth{'-'.join(('', *more))}.log"
    verdict, status = run(tiny_reference, log, flags)
    assert_same(verdict)
    assert_rotated(status)
    assert (status["rounds_ahead"] > 0) == (AHEAD[0] in more)
    assert status["spans"]["folded"] > 0 or "--vericache-fold-tail" not in more


def test_a_full_host_pool(offload_reference, logs):
    """The host holds less than the device: most requests cannot be detached, and all get there."""
    flags = (*pool(2), "--vericache-host-memory", "8MiB")
    verdict, status = run(offload_reference, logs / "offload-host.log", flags)
    assert_same(verdict)
    assert status["requests"] == 0 and status["offload"]["active"]


def test_prompts_come_while_others_decode(offload_reference, logs):
    """Known prompts, half of which fit: each is brought before its prefill, and the next ones are
    admitted as soon as theirs are there."""
    flags = (*TINY_FLAGS, *OFFLOAD, *pool(2), "--vericache-offload", "auto")
    env = {"PYTHONPATH": os.pathsep.join([str(KERNEL_LIBRARY), str(EARLY_PROMPTS)])}

    def again(base):
        return (replace(phase, flush_before=False) for phase in offload_reference.phases(base))

    with server(offload_reference.model, logs / "offload-prompts.log", flags, env) as client:
        client.run(offload_reference.phases, offload_reference.answers)
        answers = client.run(again, offload_reference.answers)
        status = settle(client)
    verdict = judge(offload_reference.calls, offload_reference.answers, answers)
    print(f"\n{verdict.summary()}\n{status['offload']}")
    assert_same(verdict)
    offload = status["offload"]
    assert offload["prompts"] >= 2 and offload["fetched_tokens"] >= 2 * min(LENGTHS)
    # Nobody leaves because it pays. Some do where those that run have outgrown the pool, which
    # depends on who runs together.
    assert status["requests"] == 0
    assert verdict.rounds > 0 and verdict.accepted > 0


@pytest.mark.parametrize("share", [2, 4, 8])
def test_a_part_of_the_pool(offload_reference, logs, share):
    """The pool holds 1/share of what the running requests need."""
    verdict, status = run(offload_reference, logs / f"offload-{share}.log", pool(share))
    assert_same(verdict)
    assert_rotated(status)
    assert verdict.rounds > 0 and verdict.accepted > 0
    offload = status["offload"]
    assert offload["active"] and offload["failed"] == offload["late"] == 0
    if share == 8:
        assert verdict.drafted > HORIZON * verdict.rounds, "nobody drafted on while it waited"
