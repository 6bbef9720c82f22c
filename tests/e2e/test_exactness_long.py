"""A thousand requests, and rows about them: ``make test-long``."""

from __future__ import annotations

import pytest
from breadth import breadth_phases
from compare import Verdict, judge
from conftest import DRAFT_FLAGS, REAL_FLAGS, TINY_FLAGS
from depth import ChatPrompts, depth_phases
from rotation_load import AHEAD, BREADTH_POOL, ROTATING, assert_rotated
from servers import server

from benchmarks.rows import Row, append

pytestmark = [pytest.mark.e2e, pytest.mark.long]

TINY_SCALE, REAL_SCALE = 12, 3
OFFLOADING = "snapkv ahead, offloading"
AS_ON_GPU = ("--vericache-horizon", "8", *AHEAD)


def measure(model, phases, flags, ours, log) -> tuple[Verdict, dict]:
    reference: dict = {}
    with server(model, log.with_suffix(".reference.log"), flags, plugin=False, with_gaps=True) as c:
        c.run(phases, reference)
    with server(model, log, (*flags, *ours)) as client:
        answers = client.run(phases, reference)
        status = client.status()
    calls = [call for phase in phases(reference) for call in phase.all_calls]
    return judge(calls, reference, answers), status


def report(case: str, model: str, flags: tuple[str, ...], verdict: Verdict) -> None:
    print(f"\n{case}: {verdict.summary()}\n" + "\n".join(verdict.near_ties))
    append(
        "exactness.jsonl",
        Row(
            case=case,
            metric="identical_outputs",
            value=verdict.compared - len(verdict.mismatches) - len(verdict.near_ties),
            baseline=verdict.compared,
            unit="requests",
            model=model,
            flags=" ".join(flags),
            tokens_per_round=round(verdict.accepted_per_round + 1, 3),
            mismatches=len(verdict.mismatches),
            near_ties=len(verdict.near_ties),
            command="make test-long",
        ),
    )


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("snapkv", ("--vericache-horizon", "8")),
        ("snapkv ahead", AS_ON_GPU),
        ("keydiff staggered", ("--vericache-compressor", "keydiff", "--vericache-stagger", "2")),
        # The pool holds the longest request and a little.
        (OFFLOADING, (*AS_ON_GPU, *ROTATING, "--max-total-tokens", str(BREADTH_POOL))),
    ],
)
def test_tiny_thousand(tiny_model, logs, name, ours):
    """1,044 requests of every shape in float32: not one token may differ but at a tie."""
    flags = (*DRAFT_FLAGS, *ours)
    verdict, status = measure(
        tiny_model,
        lambda base: breadth_phases(base, TINY_SCALE),
        TINY_FLAGS,
        flags,
        logs / f"long-{name.replace(' ', '-')}.log",
    )
    report(f"tiny random model, {name}", "tiny-random", flags, verdict)
    assert verdict.compared >= 1000
    assert not verdict.mismatches, "\n".join(verdict.mismatches)
    assert not verdict.problems, "\n".join(verdict.problems)
    assert verdict.accepted_per_round >= 2
    assert status["totals"]["draft_rows_limit_exceeded"] == 0
    if name == OFFLOADING:
        assert_rotated(status)
        assert status["rounds_ahead"] > 0


def test_real_model(real_model, logs):
    prompts = ChatPrompts(str(real_model))
    flags = DRAFT_FLAGS
    verdict, _ = measure(
        real_model,
        lambda base: depth_phases(base, prompts, REAL_SCALE),
        REAL_FLAGS,
        flags,
        logs / "long-real.log",
    )
    report("documents and second turns", real_model.name, flags, verdict)
    assert not verdict.mismatches, "\n".join(verdict.mismatches)
    assert not verdict.problems, "\n".join(verdict.problems)
