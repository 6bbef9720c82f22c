"""Figures of both sides -> rows."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving.join import Comparison, summary


def figures(rates, outputs, **more) -> dict:
    runs = [
        {
            "steady": rate,
            "whole": rate * 0.9,
            "tokens_per_round": more.get("per_round"),
            "phases_s": {},
            "first_token_s": [0.1, 0.2],
            "between_tokens_s": [0.0, 0.05],
        }
        for rate in rates
    ]
    return {
        "context": 1024,
        "requests": len(outputs),
        "tokens": 4,
        "prefill_s": 1.0,
        "first_whole": rates[0] * 0.8,
        "runs": runs,
        "outputs": outputs,
        "repetition": [0.1, 0.5],
        "chosen": more.get("chosen", {"tried": 9}),
        **more.get("besides", {}),
    }


def write(folder, number: int, name: str, cases: dict, **more) -> None:
    record = {
        "side": {"name": name, "flags": more.get("flags", "")},
        "flags": f"--common {more.get('flags', '')}".strip(),
        "model": "smol",
        "gpu": "H100",
        "commit": "abc1234",
        "command": "bench",
        "sglang": "0.5.23",
        "date": "2026-01-02",
        "start_s": more.get("start_s", 90.0),
        "simulated": more.get("simulated"),
        "cases": cases,
        "failed": {},
    }
    (folder / f"run-{number:02d}-{name}.json").write_text(json.dumps(record))


PLAIN, OURS = [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 9], [5, 6, 7, 8]]


def rows(folder) -> dict:
    return {(row.case, row.metric): row for _, row in Comparison(folder).rows()}


def test_decode_rows(tmp_path):
    """Catches a baseline of one start where there are two, and a row without what explains it."""
    write(tmp_path, 0, "plain", {"smol-1k-x32": figures([100, 102], PLAIN)})
    write(
        *(tmp_path, 1, "ours", {"smol-1k-x32": figures([300, 310, 290], OURS, per_round=12.34567)}),
        flags="--enable-vericache",
        start_s=95.0,
    )
    write(tmp_path, 2, "plain", {"smol-1k-x32": figures([96, 98], PLAIN)})
    found = rows(tmp_path)
    row = found["smol-1k-x32", "decode_rate"]
    assert (row.value, row.baseline, row.tokens_per_round) == (300, 99, 12.346)
    assert row.flags == "--common --enable-vericache" and row.commit == "abc1234"
    assert row.simulated_acceptance is None and row.date == "2026-01-02"
    for part in (
        "3 runs (290-310), baseline 4 runs (96.00-102.00)",
        "plain, ours, plain",
        "with the ragged end",
        "first token p50/p99 100.0/200.0 ms",
        "between tokens p50/p99 0.0/50.0 ms",
        "1 of 2 baseline outputs repeat at most 30%",
        "of 9 prompts tried",
        "1 of 2 outputs part from the baseline's",
    ):
        assert part in row.note, part
    start = found["start-up", "start_up"]
    assert (start.value, start.baseline, start.unit) == (95.0, 90.0, "s")
    assert "0.98 wanted" in summary([("serving.jsonl", row)])


def test_the_best_baseline_counts(tmp_path):
    """Catches a gain over the slower of SGLang's own backends."""
    write(tmp_path, 0, "plain", {"c": figures([100], PLAIN)})
    write(tmp_path, 1, "plain1", {"c": figures([150], PLAIN)}, flags="--attention-backend fa3")
    write(tmp_path, 2, "ours", {"c": figures([300], PLAIN)})
    row = rows(tmp_path)["c", "decode_rate"]
    assert row.baseline == 150 and "fa3, the best (100" in row.note


def test_simulated_acceptance_is_labelled(tmp_path):
    """Catches a replayed rate in a row that does not say so."""
    write(tmp_path, 0, "plain", {"8b-1k-x1": figures([100], PLAIN, chosen=None)})
    ours = figures([300], PLAIN, chosen=None)
    write(tmp_path, 1, "ours", {"8b-1k-x1": ours}, simulated="file, config, greedy")
    found = rows(tmp_path)
    row = found["8b-1k-x1", "decode_rate"]
    assert row.simulated_acceptance == "file, config, greedy" and "random prompts" in row.note
    assert "SIMULATED" in summary([("serving.jsonl", row)])


def test_one_side_is_no_comparison(tmp_path):
    write(tmp_path, 0, "plain", {"c": figures([100], PLAIN)})
    assert rows(tmp_path) == {}
    write(tmp_path, 1, "ours", {"d": figures([100], PLAIN)})
    assert ("d", "decode_rate") not in rows(tmp_path)


def test_exactness_row(tmp_path):
    """Catches mismatches that are lost, and first differences of whole outputs, not of tokens."""
    rescored = {
        "run": "run-01-ours.json",
        "margin": 0.25,
        "outputs": 2,
        "tokens": 8,
        "near_ties": 1,
        "worst": 0.125,
        "mismatches": [[0, 2, 0.5]],
    }
    besides = {
        "itself": {"outputs": 1, "parted": 1, "tokens": 4},
        "rescored": {"ours": rescored},
    }
    write(tmp_path, 0, "ours", {"c": figures([300], OURS)})
    write(tmp_path, 1, "plain", {"c": figures([100], PLAIN, besides=besides)})
    row = rows(tmp_path)["c", "first_differences"]
    assert (row.mismatches, row.near_ties) == (1, 1)
    # Ours part once in 3 + 4 tokens that could have been the first difference.
    assert row.value == pytest.approx(1000 / 7, abs=0.001) and row.baseline == 250
    assert "0.25" in row.note and "8 tokens of 2 outputs" in row.note


def test_traffic_rows(tmp_path):
    """Catches a case with arrivals whose latencies have no row."""

    def traffic(throughput, latency):
        run = {"output_throughput": throughput, "p99_itl_ms": latency, "p99_ttft_ms": latency}
        return {"rate": 70.0, "requests": 100, "capacity": 100.0, "runs": [run] * 3}

    write(tmp_path, 0, "plain", {"smol-mix": traffic(1000.0, 10.0)})
    write(tmp_path, 1, "ours", {"smol-mix": traffic(990.0, 12.0)})
    found = rows(tmp_path)
    assert found["smol-mix", "output_throughput"].value == 990
    row = found["smol-mix", "between_tokens_p99"]
    assert (row.value, row.baseline, row.unit) == (12.0, 10.0, "ms")
    assert "70.0 a second of 100.0" in row.note
