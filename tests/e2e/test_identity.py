"""The same tokens as SGLang without the flag, and drafting that really happened.

Each test is one server with its own way of drafting, given the same calls as the reference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from breadth import BY_RATIO, breadth_phases, penalties_together
from compare import Verdict, judge
from conftest import DRAFT_FLAGS, TINY_FLAGS, Reference, make_reference
from servers import server

from sglang_vericache.config import VeriCacheConfig

pytestmark = pytest.mark.e2e

ADAPTIVE_PHASES = ("together", "shared", "turn2", "streams", "features")
# The share of decode tokens that must come from rounds, and the drafts that must stand in one.
LEAST_ROUND_SHARE, LEAST_ACCEPTED = 0.8, 2.0


# Enough for a compressor: first prompts in chunks, prefixes that others share, next turns and
# prompts that are known already.
SHORT_PHASES = ("together", "shared", "turn2", "identical")


def run_ours(reference: Reference, log, flags=(), env=None, drafting=DRAFT_FLAGS):
    """Verdict and the server's status after the reference's phases."""
    flags = (*reference.flags, *drafting, *flags)
    with server(reference.model, log, flags, env) as client:
        answers = client.run(reference.phases, reference.answers)
        status = client.status()
    verdict = judge(reference.calls, reference.answers, answers)
    print(f"\n{verdict.summary()}\n" + "\n".join(verdict.near_ties))
    return answers, verdict, status


def assert_same(verdict: Verdict) -> None:
    assert verdict.compared > 0
    assert not verdict.mismatches, "\n".join(verdict.mismatches)
    assert not verdict.problems, "\n".join(verdict.problems)


def assert_drafted(verdict: Verdict, status, least_accepted=LEAST_ACCEPTED) -> None:
    assert verdict.round_share >= LEAST_ROUND_SHARE, verdict.summary()
    assert verdict.accepted_per_round >= least_accepted, verdict.summary()
    assert status["totals"]["draft_rows_limit_exceeded"] == 0
    assert status["requests"] == 0
    # Nothing but spans on the tree outlives the requests.
    assert status["draft_pool"]["used_tokens"] == status["spans"]["owned_tokens"]


def test_tiny_snapkv(tiny_reference, logs):
    """The main path: chunked prefill, prefixes, turns, stops, streams, plain features."""
    answers, verdict, status = run_ours(
        tiny_reference, logs / "tiny-snapkv.log", ("--vericache-horizon", "8")
    )
    assert_same(verdict)
    assert_drafted(verdict, status)
    spans = status["spans"]
    assert spans["built"] > 0 and spans["reused"] > 0
    assert spans["scored_with_computed"] > 0
    assert status["cached_prefills"] > 0
    for name, answer in answers.items():
        if answer.chunks:
            assert all(size > 0 for size in answer.chunks), f"{name}: an empty chunk"
            assert max(answer.chunks) > 1, f"{name}: a round's tokens came one by one"


def test_tiny_keydiff_staggered_retracted_small_pool(tiny_reference, logs):
    """Steps that accept nothing, retraction at every few steps, spans evicted for memory."""
    _, verdict, status = run_ours(
        tiny_reference,
        logs / "tiny-stagger.log",
        (
            *("--vericache-compressor", "keydiff", "--vericache-stagger", "3"),
            *("--vericache-horizon", "6", "--vericache-fold-tail", "70"),
            *("--vericache-draft-memory", "5MiB"),
        ),
        {
            "SGLANG_TEST_RETRACT": "1",
            "SGLANG_TEST_RETRACT_INTERVAL": "17",
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
        },
    )
    assert_same(verdict)
    assert status["totals"]["draft_rows_limit_exceeded"] == 0
    assert status["spans"]["evicted"] > 0
    assert status["spans"]["folded"] > 0
    assert verdict.accepted > 0 and verdict.rounds > 0


def test_tiny_drafting_ahead(tiny_reference, logs):
    """The order of a GPU's steps: verify, then draft the next round; with tails folded between,
    retraction, and outputs that end while the next round is drafted."""
    _, verdict, status = run_ours(
        tiny_reference,
        logs / "tiny-ahead.log",
        (
            *("--vericache-draft-ahead", "on"),
            *("--vericache-horizon", "6", "--vericache-fold-tail", "70"),
        ),
        {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "17"},
    )
    assert_same(verdict)
    assert status["rounds_ahead"] > 0.5 * verdict.rounds / len(tiny_reference.calls)
    assert status["spans"]["folded"] > 0
    assert_drafted(verdict, status)


def test_tiny_verified_by_the_draft_kernel(tiny_reference, logs):
    """Verify passes without the server's attention backend."""
    reference = replace(
        tiny_reference,
        phases=lambda base: (p for p in tiny_reference.phases(base) if p.name in SHORT_PHASES),
    )
    flags = ("--vericache-verify-attention", "triton", "--vericache-horizon", "8")
    _, verdict, status = run_ours(reference, logs / "tiny-triton.log", flags)
    assert status["verify_attention"] == "triton"
    assert_same(verdict)
    assert_drafted(verdict, status)


@pytest.mark.parametrize("compressor", ["expected_attention", "streamingllm"])
def test_tiny_compressors(tiny_reference, logs, compressor):
    """What a compressor sees of chunked prefills, prefixes and turns, in a server."""
    reference = replace(
        tiny_reference,
        phases=lambda base: (p for p in tiny_reference.phases(base) if p.name in SHORT_PHASES),
    )
    flags = ("--vericache-compressor", compressor, "--vericache-horizon", "8")
    _, verdict, status = run_ours(reference, logs / f"tiny-{compressor}.log", flags)
    assert_same(verdict)
    assert_drafted(verdict, status)
    spans = status["spans"]
    scored = [spans[f"scored_{how}"] for how in ("with_computed", "with_stored", "without")]
    if compressor == "streamingllm":
        assert scored == [0, 0, 0] and not spans["observation_bytes"]
    else:
        assert scored[0] > 0 and scored[1] > 0 and spans["observation_bytes"] > 0
        assert sum(scored) == spans["built"]


def test_short_contexts_are_kept_whole(tiny_reference, logs):
    """The least number of tokens by default: no draft over a short context fails, and a longer one
    is compressed to as many and drafts as well."""
    reference = replace(
        tiny_reference,
        phases=lambda base: (p for p in tiny_reference.phases(base) if p.name in SHORT_PHASES),
    )
    flags = ("--vericache-horizon", "8")
    drafting = tuple(flag for flag in DRAFT_FLAGS if flag not in BY_RATIO)
    answers, verdict, status = run_ours(
        reference, logs / "tiny-floor.log", flags, drafting=drafting
    )
    assert_same(verdict)
    assert_drafted(verdict, status)
    least = status["config"]["keep_min_tokens"]
    assert least == VeriCacheConfig.keep_min_tokens
    short = long = 0
    for call in reference.calls:
        info, tokens = answers[call.name].info, len(call.prompt)
        if info is None or not info["drafted"]:
            continue
        rows = info["draft_rows_read"] / info["drafted"]
        if tokens + call.max_new_tokens <= least:
            assert rows >= tokens, f"{call.name}: tokens are left out of {tokens}"
            short += 1
        elif tokens > 1.5 * least:
            assert least <= rows < tokens, f"{call.name}: {rows} rows of {tokens} tokens"
            long += 1
    assert short > 5 and long > 1


@pytest.mark.parametrize("ahead", ["off", "on"])
def test_views_grow(tiny_references, logs, ahead):
    """Larger views where the drafts over a twentieth fail, in both orders of a step, with tails
    folded between and prompts that others share."""
    _, verdict, status = run_ours(
        tiny_references["growth"],
        logs / f"tiny-grow-{ahead}.log",
        (
            *("--vericache-grow-views", "on", "--vericache-draft-ahead", ahead),
            *("--vericache-keep-ratio", "0.05", "--vericache-fold-tail", "70"),
            *("--vericache-horizon", "6"),
        ),
    )
    assert_same(verdict)
    assert_drafted(verdict, status)
    assert status["spans"]["views_grown"] > 3, status["spans"]
    assert status["spans"]["folded"] > 0


@pytest.mark.parametrize(
    ("step_ms", "ahead", "takes"),
    [(100_000, "off", "plain_together"), (1, "off", "rounds_in_parts"), (1, "on", "rounds_ahead")],
)
def test_adaptive_horizon(tiny_reference, logs, step_ms, ahead, takes):
    """Horizons that change while requests run, views closed and opened again, several plain
    tokens a step, with stops among them, and rounds that take several steps."""
    reference = replace(
        tiny_reference,
        phases=lambda base: (p for p in tiny_reference.phases(base) if p.name in ADAPTIVE_PHASES),
    )
    flags = (
        *("--vericache-horizon", "8", "--vericache-horizon-policy", "adaptive"),
        *("--vericache-max-step-ms", str(step_ms), "--vericache-draft-ahead", ahead),
    )
    _, verdict, status = run_ours(reference, logs / f"adaptive-{step_ms}-{ahead}.log", flags)
    assert not verdict.mismatches, "\n".join(verdict.mismatches)
    assert verdict.rounds > 0 and verdict.accepted > 0
    assert status[takes] > 0
    horizons = status["horizons"]
    assert {"0", "8"} <= set(horizons["chosen"]) and {"0", "8"} <= set(horizons["predicted"])
    assert all(horizons["costs"][part] for part in ("draft_s", "verify_s", "rest_s"))


def test_without_overlap_scheduling(tiny_model, logs):
    """Penalties see every token one step earlier than with overlap, so the reference is its own."""
    flags = (*TINY_FLAGS, "--disable-overlap-schedule")

    def phases(base):
        yield from breadth_phases(base)
        yield from penalties_together(base)

    reference = make_reference(tiny_model, flags, phases, logs / "sync-reference.log")
    _, verdict, status = run_ours(reference, logs / "sync.log", ("--vericache-horizon", "5"))
    assert_same(verdict)
    assert_drafted(verdict, status)


def test_real_model(real_reference, logs):
    """A fifth of the tokens of real text, with a real model."""
    _, verdict, status = run_ours(real_reference, logs / "real.log")
    assert_same(verdict)
    assert_drafted(verdict, status)
