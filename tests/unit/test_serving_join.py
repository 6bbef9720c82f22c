"""Figures of both sides -> rows."""

from __future__ import annotations

import json
import statistics

import pytest

from benchmarks.serving.join import Comparison, summary


def figures(rates, outputs, **more) -> dict:
    runs = [
        {
            "steady": rate,
            "whole": 100.0 if rate is None else rate * 0.9,
            "after_first": rate * 0.95 if len(outputs) == 1 else None,
            "tokens_per_round": more.get("per_round"),
            "phases_s": {},
            "first_token_s": [0.1, 0.2],
            "between_tokens_s": [0.0, 0.05],
            "between_tokens_even_s": [0.004, 0.005],
        }
        for rate in rates
    ]
    return {
        "context": 1024,
        "requests": len(outputs),
        "tokens": 4,
        "prefill_s": 1.0,
        "first_whole": 80.0,
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
        "model": more.get("model", "smol"),
        "gpu": more.get("gpu", "H100"),
        "machine": more.get("machine", "here"),
        "commit": more.get("commit", "abc1234"),
        "command": "bench",
        "sglang": "0.5.23",
        "date": "2026-01-02",
        "start_s": more.get("start_s", 90.0),
        "simulated": more.get("simulated"),
        "cases": cases,
        "failed": more.get("failed", {}),
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
        "fixed set, rate while all run, from token 32",
        "3 runs (290-310), baseline 4 runs (96.00-102.00)",
        "plain, ours, plain",
        "from sending to the last token 270 to 86 tokens/s (3.12x)",
        "first token p50/p99 100.0/200.0 ms",
        "between tokens as they arrive p50/p99 0.0/50.0 ms",
        "sharing their time, p50/p99 4.0/5.0 ms (baseline 4.0/5.0)",
        "1 of 2 baseline outputs repeat at most 30%",
        "of 9 prompts tried",
        "1 of 2 outputs part from the baseline's",
    ):
        assert part in row.note, part
    whole = found["smol-1k-x32", "fixed_set_rate"]  # not only the stretch in which all of it ran
    assert (whole.value, whole.baseline) == (270, pytest.approx(89.1))
    start = found["start-up", "start_up"]
    assert (start.value, start.baseline, start.unit) == (95.0, 90.0, "s")
    assert "0.98 wanted" in summary([("serving.jsonl", row)])


def closed(rates, **more) -> dict:
    loop = {
        "rates": rates,
        "seconds": 8.0,
        "complete": 40,
        "running": 1.9,
        "tokens_per_round": 9.0,
        "first_token_s": [0.3, 0.4],
        "between_tokens_s": None,
        "between_tokens_even_s": None,
    }
    return {"closed": loop | more}


def test_the_closed_loop_has_its_own_row(tmp_path):
    """Catches arrivals in a decode rate, and figures of the loop that pass for the fixed set's."""
    plain = figures([100], PLAIN, besides=closed([50.0, 60.0, 70.0, 80.0], running=2.0))
    write(tmp_path, 0, "plain", {"c": plain})
    ours = figures([210, 230], OURS, besides=closed([130.0, 90.0, 110.0, 130.0]), per_round=4.0)
    write(tmp_path, 1, "ours", {"c": ours})
    found = rows(tmp_path)
    row = found["c", "decode_rate"]
    assert (row.value, row.baseline, row.tokens_per_round) == (220, 100, 4.0)
    assert "closed loop" not in row.note
    row = found["c", "closed_loop_rate"]
    assert (row.value, row.baseline, row.tokens_per_round) == (120, 65, 9.0)
    for part in (
        "closed loop: 2 clients",
        "8 s are counted from 1 s after all have begun",
        "4 windows (90.00-130.00), baseline 4 windows (50.00-80.00)",
        "on average 1.9 requests (baseline 2.0); 40 complete",
        "first token p50/p99 300.0/400.0 ms",
        "baseline outputs repeat at most",
    ):
        assert part in row.note, part
    assert "first run" not in row.note and "all of it run" not in row.note
    # A start without a loop adds nothing to that row, nor does a baseline that has none.
    write(tmp_path, 2, "plain", {"c": figures([900], PLAIN)})
    write(tmp_path, 3, "plain1", {"c": figures([700], PLAIN)}, flags="--attention-backend fa3")
    found = rows(tmp_path)
    row = found["c", "closed_loop_rate"]
    assert (row.value, row.baseline) == (120, 65) and "on average 1.9" in row.note
    assert found["c", "decode_rate"].baseline == 700
    # Without one on both sides there is no such row.
    write(tmp_path, 0, "plain", {"c": figures([100], PLAIN)})
    assert ("c", "closed_loop_rate") not in rows(tmp_path)


def test_not_all_of_a_set_ever_run(tmp_path):
    """Catches the stretch of one side beside the whole of the other, or a median of some runs."""
    write(tmp_path, 0, "plain", {"c": figures([100], PLAIN)})
    write(tmp_path, 1, "ours", {"c": figures([None, 210], OURS)})
    found = rows(tmp_path)
    assert ("c", "fixed_set_rate") not in found
    row = found["c", "decode_rate"]
    assert "prefixes cached; fixed set, from sending to the last token; 2 runs" in row.note
    assert "with the flag no stretch of 0.25 s and 64 tokens in which all of it run" in row.note
    assert (row.value, row.baseline) == (statistics.median([100.0, 189.0]), 90)


def test_how_a_fixed_set_began(tmp_path):
    """Catches a row that does not say how far its requests began together, and one of older
    figures that says more than was measured."""

    def together(rates, outputs, begun, steady):
        made = figures(rates, outputs, besides={"sent": "in one request"})
        for run in made["runs"]:
            run |= {"begun_within_s": begun, "steady_s": steady}
        return made

    write(tmp_path, 0, "plain", {"c": together([100], PLAIN, 0.02, 9.0), "d": figures([1], PLAIN)})
    write(tmp_path, 1, "ours", {"c": together([300], OURS, 0.03, 3.0), "d": figures([1], OURS)})
    found = rows(tmp_path)
    for metric in ("decode_rate", "fixed_set_rate"):
        note = found["c", metric].note
        for part in (
            "fixed set, sent in one request so that all begin together, ",
            "all began within 30 ms (baseline 20)",
            "all of it run for 3.00 s (baseline 9.00)",
            "first token, from sending all of it, p50/p99 100.0/200.0 ms",
        ):
            assert part in note, (metric, part)
    assert "from sending to the last token; 1 runs" in found["c", "fixed_set_rate"].note
    assert "while all of it run 300 to 100 tokens/s" in found["c", "fixed_set_rate"].note
    older = found["d", "decode_rate"].note
    for part in ("begin together", "began", "from sending all"):
        assert part not in older, part


def test_a_lone_request(tmp_path):
    """Catches the time to the first token in the rate of a lone request."""
    write(tmp_path, 0, "plain", {"c": figures([100, 104], PLAIN[:1])})
    write(tmp_path, 1, "ours", {"c": figures([200], OURS[:1])})
    row = rows(tmp_path)["c", "decode_rate"]
    assert (row.value, row.baseline) == (190, pytest.approx(96.9))
    assert "from the first token to the last" in row.note and "all of it run" not in row.note


def test_a_start_that_compiles_is_no_start_up(tmp_path):
    """Catches a gain in start-up over a server that compiled kernels for both."""
    write(tmp_path, 0, "plain", {"c": figures([100], PLAIN)}, start_s=149.0)
    write(tmp_path, 1, "ours", {"c": figures([100], OURS)}, start_s=113.0)
    assert ("start-up", "start_up") not in rows(tmp_path)
    write(tmp_path, 2, "plain", {"c": figures([100], PLAIN)}, start_s=100.0)
    start = rows(tmp_path)["start-up", "start_up"]
    assert (start.value, start.baseline) == (113, 100) and "none the first" in start.note


def test_failures_are_told(tmp_path):
    """Catches a comparison that does not say what it lacks."""
    write(tmp_path, 0, "plain", {"c": figures([100], PLAIN)}, failed={"d": "too large"})
    assert Comparison(tmp_path).failures == ["plain: d: too large"]


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
        "margin": 0.25,
        "outputs": 2,
        "tokens": 8,
        "near_ties": 1,
        "worst": 0.125,
        "mismatches": [[0, 2, 0.5]],
    }
    besides = {
        "itself": {"outputs": 1, "parted": 1, "tokens": 4},
        "rescored": {"run-00-ours.json": rescored},
    }
    write(tmp_path, 0, "ours", {"c": figures([300], OURS)})
    write(tmp_path, 1, "plain", {"c": figures([100], PLAIN, besides=besides)})
    row = rows(tmp_path)["c", "first_differences"]
    assert (row.mismatches, row.near_ties) == (1, 1)
    # Ours part once in 3 + 4 tokens that could have been the first difference.
    assert row.value == pytest.approx(1000 / 7, abs=0.001) and row.baseline == 250
    assert "0.25" in row.note and "8 tokens of 2 outputs" in row.note and "own 8" not in row.note
    besides["own_rescored"] = rescored | {"furthest": 0.5}
    write(tmp_path, 2, "plain", {"c": figures([100], PLAIN, besides=besides)})
    note = rows(tmp_path)["c", "first_differences"].note
    assert "own 8 tokens (the same start) 1 are near ties" in note
    assert "and 1 further below (furthest 0.500)" in note


def test_only_like_is_compared_with_like(tmp_path):
    """Catches a gain over another device, model or case of the same name, and a join that fails."""
    write(tmp_path, 0, "plain", {"c": figures([100], PLAIN), "d": figures([100], PLAIN[:1])})
    ours = {"c": figures([300], OURS), "d": figures([300], OURS)}
    for number, other in ((1, {"gpu": "H200"}), (2, {"model": "large"})):
        write(tmp_path, number, "ours", ours, **other)
    comparison = Comparison(tmp_path)
    assert list(comparison.rows()) == [] and len(comparison.failures) == 4
    assert "nothing to compare with" in comparison.failures[0]
    write(tmp_path, 3, "ours", ours, machine="there")
    assert list(rows(tmp_path)) == [("c", "decode_rate"), ("c", "fixed_set_rate")]
    assert "NOT ON THE SAME MACHINE" in rows(tmp_path)["c", "decode_rate"].note


def test_other_prompts_are_not_compared(tmp_path):
    """Catches a comparison of answers to prompts that were chosen twice."""
    for number, name, digest in ((0, "plain", "one"), (1, "ours", "another")):
        chosen = {"tried": 9, "digest": digest}
        write(tmp_path, number, name, {"c": figures([100], PLAIN, chosen=chosen)})
    comparison = Comparison(tmp_path)
    assert list(comparison.rows()) == [] and "other requests" in comparison.failures[0]


def test_flags_and_commits_are_not_mixed(tmp_path):
    """Catches a median over servers that differ in more than the time of their start."""
    write(tmp_path, 0, "plain", {"c": figures([100], PLAIN)})
    for number, rate, more in (
        (1, 200, {"flags": "--a"}),
        (2, 300, {"flags": "--b"}),
        (3, 400, {"flags": "--b", "commit": "def5678"}),
        (4, 500, {"flags": "--b", "commit": "def5678"}),
    ):
        write(tmp_path, number, "ours", {"c": figures([rate], OURS)}, **more)
    found = [row for _, row in Comparison(tmp_path).rows() if row.metric == "decode_rate"]
    assert [row.value for row in found] == [200, 300, 450]
    assert "NOT ON" not in found[0].note


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
