"""What the forecast says of cases that were measured, against their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_vericache.forecast.hardware import CARDS
from sglang_vericache.forecast.load import Draft, Load
from sglang_vericache.forecast.shape import KNOWN
from sglang_vericache.forecast.simulate import simulate_offload, simulate_plain
from sglang_vericache.forecast.timing import Timing

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = CARDS["h200"]
# Bytes of a compressed row by those of a token: a fifth of the tokens in four bits.
NARROW, WIDE = 0.2 * 72 / 256, 0.2 * 136 / 512


def row(file: str, case: str, metric: str, commit: str) -> dict:
    """The latest one."""
    lines = (RESULTS / file).read_text().splitlines()
    rows = [r for r in map(json.loads, lines) if (r["case"], r["metric"]) == (case, metric)]
    found = [r for r in rows if r["commit"].startswith(commit)]
    assert found, f"no row of {case} at {commit}"
    return found[-1]


@pytest.mark.parametrize(
    ("case", "model", "requests", "tokens", "horizon", "yields", "kept"),
    [
        pytest.param("smol-7k7-x256", "smollm2-135m", 256, 7_940, 7, 5.75, NARROW),
        pytest.param("smol-7k7-x128", "smollm2-135m", 128, 7_940, 4, 4.21, NARROW),
        pytest.param("8b-32k-x12", "llama-3.1-8b", 12, 33_024, 15, 13.2, WIDE),
        pytest.param("8b-8k-x48", "llama-3.1-8b", 48, 8_448, 15, 13.2, WIDE),
    ],
)
def test_rates_while_all_run(case, model, requests, tokens, horizon, yields, kept):
    """Catches launches, bytes or products that are left out, or counted twice."""
    measured = row("serving.jsonl", case, "decode_rate", "90113f5")
    timing, context = Timing(KNOWN[model], H200), requests * tokens
    plain = requests / timing.plain(requests, context)
    verify = timing.verify(requests, context, horizon + 1)
    round_s = horizon * timing.draft(requests, context, kept) + verify
    assert plain == pytest.approx(measured["baseline"], rel=0.1)
    assert requests * yields / round_s == pytest.approx(measured["value"], rel=0.15)


@pytest.mark.parametrize(
    ("case", "commit", "model", "load", "memory", "main", "draft"),
    [
        pytest.param(
            *("24b-16k-pool48k", "2478edb", "mistral-small-24b", Load(8, 16_384, 512)),
            *(48_000, 39_142, Draft(15, 13.1, WIDE)),
            id="rotating",
        ),
        # Neither let requests in together, nor brought their prompts before, at that commit.
        pytest.param(
            *("8b-32k-queue24", "90113f5", "llama-3.1-8b", Load(24, 32_768, 512)),
            *(442_000, 401_096, Draft(15, 13.1, WIDE, brings_prompts=False)),
            id="staying",
        ),
        pytest.param(
            *("smol-7k7-pool8", "90113f5", "smollm2-135m", Load(256, 7_700, 256)),
            *(246_400, 225_100, Draft(4, 4.17, NARROW, 0.15, False, False)),
            id="prefills",
        ),
    ],
)
def test_gains_of_queues(case, commit, model, load, memory, main, draft):
    """Catches a forecast that is off by more than 15 %."""
    measured = row("offload.jsonl", case, "queue_rate", commit)
    shape = KNOWN[model]
    plain = simulate_plain(shape, H200, load, memory).tokens_per_s
    ours = simulate_offload(shape, H200, load, main, draft).tokens_per_s
    assert ours / plain == pytest.approx(measured["value"] / measured["baseline"], rel=0.15)
    # Two servers were up at once with the small model.
    assert plain == pytest.approx(measured["baseline"], rel=0.25)


def test_requests_that_are_let_in_together():
    """Catches prefills that cost nothing: with one for each request of a small model nobody
    decodes for half the time."""
    load, shape = Load(256, 7_700, 256), KNOWN["smollm2-135m"]
    one_by_one, together = (
        simulate_offload(shape, H200, load, 225_100, Draft(4, 4.17, NARROW, 0.15, together))
        for together in (False, True)
    )
    assert together.tokens_per_s > 1.3 * one_by_one.tokens_per_s
    assert together.together == one_by_one.together


def test_prompts_that_come_while_others_decode():
    load, shape = Load(24, 32_768, 512), KNOWN["llama-3.1-8b"]
    in_prefills, before = (
        simulate_offload(shape, H200, load, 401_096, Draft(15, 13.1, WIDE, brings_prompts=first))
        for first in (False, True)
    )
    assert before.tokens_per_s > 1.02 * in_prefills.tokens_per_s
    assert before.link_use == pytest.approx(in_prefills.link_use, rel=0.1)
