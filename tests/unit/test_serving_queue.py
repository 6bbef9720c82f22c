"""Cases of more requests than fit: what is timed, against what, and what a row says of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.registry import CASES, Case, UnknownCaseError, serving_case
from benchmarks.serving import queue
from benchmarks.serving.__main__ import OURS, _with_host, _with_pools
from benchmarks.serving.figures import Stream
from benchmarks.serving.join import Comparison
from benchmarks.serving.pools import (
    draft_slots,
    main_tokens,
    pool_note,
    pools,
    row_bytes,
    shape_for,
)
from benchmarks.serving.queue import (
    best_level,
    concurrencies,
    host_flags,
    measure_queue,
    offload_flags,
    running,
    shared_set_up,
    slowest_to_median,
)
from benchmarks.tables import table
from sglang_vericache.metrics import RowBytes

QUEUED = Case(
    *("q", "", "", 100, 8, 2.0, "serving"), tokens=20, queued=True, pool_tokens=400, host_gb=1.5
)


def stream(first: float, last: float) -> Stream:
    return Stream(0.0, ((first, 1), (last, 20)))


def test_running():
    """Catches requests counted from their release, or beyond their end."""
    mean, most = running([stream(1, 4), stream(2, 5), stream(5, 10)])
    assert (mean, most) == (pytest.approx((3 + 3 + 5) / 10), 2)


def test_fairness():
    assert slowest_to_median([stream(1, 4), stream(1, 5), stream(1, 15)]) == 3


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ({}, [8, 3]),
        ({"pool_tokens": None}, [8]),
        ({"pool_tokens": 10_000}, [8]),
        ({"pool_tokens": 50}, [8, 1]),
        ({"prefixes": 2, "shared_tokens": 90}, [8, 7]),
        ({"prefixes": 4, "shared_tokens": 90}, [8, 4]),  # not all prefixes fit
    ],
)
def test_concurrencies(values, levels):
    """Catches a baseline that only ever runs more than its pool holds, and retracts."""
    assert concurrencies(replace(QUEUED, **values)) == levels


def test_both_host_tiers_have_one_size():
    assert "--hicache-size 2 " in host_flags(QUEUED), "SGLang takes whole numbers"
    assert offload_flags(QUEUED).endswith("--vericache-host-memory 1430MiB")


def test_cases_of_one_call():
    """Catches a case measured with the pool of another."""
    assert shared_set_up([QUEUED, replace(QUEUED, name="r", context=50)]) is QUEUED
    assert shared_set_up([CASES["smol-1k-x1"]]) is None
    for other in (CASES["smol-1k-x1"], replace(QUEUED, name="r", pool_tokens=401)):
        with pytest.raises(ValueError, match=f"q, {other.name} differ .*: a call for each"):
            shared_set_up([QUEUED, other])


def test_ad_hoc():
    case = serving_case("mine:100:8:400:1.5")
    assert (case.queued, case.pool_tokens, case.host_gb) == (True, 400, 1.5)
    for text in ("mine:100:8:400", "mine:100:8:400:1:2", "mine:100:8:a:1"):
        with pytest.raises(UnknownCaseError, match="NAME:CONTEXT:REQUESTS:POOL_TOKENS:HOST_GB"):
            serving_case(text)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.queued])
def test_the_host_tier_holds_the_case(name):
    """Catches prompts that do not all lie in the host tier, as rows say they do."""
    case = CASES[name]
    bytes_of = {"shape:24b": 2 * 40 * 8 * 128 * 2, "shape:8b": 2 * 32 * 8 * 128 * 2}
    token_bytes = bytes_of.get(case.model, 2 * 30 * 3 * 64 * 2)
    own = case.requests * (case.context - case.shared_tokens + case.tokens)
    tokens = own + case.prefixes * case.shared_tokens
    assert tokens * token_bytes <= case.host_gb * 1e9 <= 1.25 * tokens * token_bytes


# The same KV memory for every server

SMOL_ROW = RowBytes(full=2 * 30 * 3 * 64 * 2, draft=30 * 3 * 72)
WITH_POOL = [case for case in CASES.values() if case.queued]


def row_of(case: Case) -> RowBytes:
    return row_bytes(case.model) if case.model.startswith("shape:") else SMOL_ROW


def weights_of(case: Case) -> int:
    return shape_for(case.model).weight_bytes


def test_bytes_of_a_row():
    """Mistral Small 24B: 40 layers of 8 heads of 128; int4 with two scales and two offsets."""
    assert row_bytes("shape:24b") == RowBytes(full=163_840, draft=40 * 8 * (128 + 8))


@pytest.mark.parametrize("case", WITH_POOL, ids=lambda case: case.name)
@pytest.mark.parametrize("offloads", [True, False])
def test_both_pools_take_what_one_takes(case, offloads):
    """Catches a gain that is bought with more memory."""
    row = row_of(case)
    split = pools(case, row, offloads, weights_of(case))
    budget = case.pool_tokens * row.full
    assert budget - row.full < split.main_tokens * row.full + split.draft_bytes <= budget
    assert f"--max-total-tokens {split.main_tokens} " in split.flags
    if offloads:
        attached = max(n for n in range(1, 99) if main_tokens(case, n) <= split.main_tokens)
        views = draft_slots(case, min(attached, case.requests)) * row.draft
        assert split.draft_bytes >= min(views, budget // 4)
        assert split.main_tokens >= 2 * (case.context + case.tokens), "no two paths fit"


@pytest.mark.parametrize(
    ("name", "attached", "views"),
    [
        ("24b-16k-pool48k", 2, 8),
        ("24b-32k-queue16", 4, 16),
        ("8b-32k-queue24", 12, 21),
        ("smol-7k7-pool8", 28, 38),
    ],
)
def test_views_give_way_to_one_more_place(name, attached, views):
    """Catches a last wave of two requests where 24 would have come in two waves of twelve, and
    requests that cannot leave the device because they have no view."""
    case = CASES[name]
    row = row_of(case)
    split = pools(case, row, True, weights_of(case))
    fitting = [n for n in range(1, 99) if main_tokens(case, n) <= split.main_tokens]
    held = [n for n in range(1, 99) if draft_slots(case, n) * row.draft <= split.draft_bytes]
    assert (fitting[-1], min(held[-1], case.requests)) == (attached, views)


def test_texts_of_the_cases_are_true():
    fitting = {
        case.name: max(n for n in range(1, 300) if main_tokens(case, n) <= case.pool_tokens)
        for case in WITH_POOL
        if not case.prefixes
    }
    assert fitting["24b-16k-pool48k"] == 2 and fitting["24b-32k-queue16"] == 5
    assert fitting["8b-32k-queue24"] == 13 and fitting["smol-7k7-pool8"] == 30
    anyway = CASES["fits-anyway"]
    for offloads in (True, False):
        left = pools(anyway, row_of(anyway), offloads, weights_of(anyway)).main_tokens
        assert main_tokens(anyway, anyway.requests) <= left


def test_flags_of_the_sides():
    case = CASES["24b-16k-pool48k"]
    plain = _with_pools(host_flags(case), case, case.model)
    assert plain.endswith(" --max-total-tokens 48000")
    ours, attached = (
        _with_pools(f"{OURS} {flags}", case, case.model)
        for flags in (offload_flags(case), host_flags(case))
    )
    assert "--vericache-draft-memory 1384MiB" in ours and "--max-total-tokens 39142 " in ours
    assert "--vericache-draft-memory" in attached and attached.count("--max-total-tokens") == 1
    own = f"{OURS} --max-total-tokens 7"
    assert _with_pools(own, case, case.model) == own
    assert pool_note(ours, plain) == (
        "KV memory: a main pool of 39142 tokens and a draft pool of 1384MiB (baseline 48000 tokens)"
    )
    assert pool_note(OURS, "") is None


def test_given_flags_keep_the_host_tier():
    """Catches a queue that is to rotate and stands, because a flag of another kind was given."""
    case = CASES["8b-32k-queue24"]
    ours = _with_host(f"{OURS} --vericache-horizon 7", case)
    assert ours.endswith(f"--vericache-horizon 7 {offload_flags(case)}")
    assert _with_host("", case) == host_flags(case)
    for own in (f"{OURS} --vericache-offload off", f"{OURS} {host_flags(case)}", host_flags(case)):
        assert _with_host(own, case) == own


class Answer:
    """As benchmarks.serving.client.Answer, of a request that took ``seconds``."""

    watched, events, counters = True, [(1.0, 1)], None

    def __init__(self, seconds: float) -> None:
        self.stream, self.output = stream(1.0, seconds), [1] * 20


class Server:
    """``seconds`` a queue by how many are sent at a time; notes what it is asked."""

    url = "nowhere"

    def __init__(self, plugin: bool, seconds: dict[int, float]) -> None:
        self.plugin, self.seconds, self.levels, self.fetched = plugin, seconds, [], 0

    def prefill_in_turn(self, prompts) -> float:
        self.prefilled = len(prompts)
        return 2.0

    def queue(self, prompts, tokens, at_once) -> list[Answer]:
        assert self.prefilled == len(prompts), "prompts lie in the host tier first"
        self.levels.append(at_once)
        self.fetched += 10
        return [Answer(self.seconds[at_once]) for _ in prompts]

    def status(self):
        offload = {"active": True, "fetches": self.fetched, "fetched_bytes": self.fetched * 10**9}
        offload |= {"fetch_seconds": self.fetched / 5, "failed": 0, "late": 1, "cancelled": 0}
        return {"offload": offload, "phase_seconds": {}} if self.plugin else None


def measured(monkeypatch, plugin: bool, seconds: dict[int, float]):
    server = Server(plugin, seconds)
    monkeypatch.setattr(queue, "StreamingClient", lambda url: server)
    return measure_queue(server, QUEUED, [[1]] * 8, 2), server


def test_an_unmodified_server_has_its_best_concurrency(monkeypatch):
    """Catches a gain over a baseline that retracts all the time."""
    figures, server = measured(monkeypatch, False, {8: 20.0, 3: 10.0})
    assert server.levels == [8] * 3 + [3] * 2, "a first run, and two that count of each"
    level, best = best_level(figures)
    assert level == 3 and [run["whole"] for run in best["runs"]] == [16.0, 16.0]
    assert figures["itself"]["outputs"] == 8


def write(folder, number: int, name: str, figures: dict, flags: str, simulated=None) -> None:
    kept = {"model": "24b", "gpu": "H100", "commit": "abc1234", "command": "bench"}
    record = kept | {
        "side": {"name": name, "flags": flags},
        "flags": f"--common {flags}",
        "sglang": "0.5.23",
        "date": "2026-01-02",
        "start_s": 90.0,
        "simulated": simulated,
        "cases": {"24b-16k-pool48k": figures | {"chosen": None}},
        "failed": {},
    }
    (folder / f"run-{number:02d}-{name}.json").write_text(json.dumps(record))


def test_rows(monkeypatch, tmp_path):
    """Catches a gain that only the draft brings, and rows without what the link did."""
    plain, _ = measured(monkeypatch, False, {8: 20.0, 3: 10.0})
    ours, _ = measured(monkeypatch, True, {8: 4.0})
    attached, _ = measured(monkeypatch, True, {8: 5.0})
    write(tmp_path, 0, "plain", plain, host_flags(QUEUED))
    write(tmp_path, 1, "ours", ours, offload_flags(QUEUED), "file, config, greedy")
    write(tmp_path, 2, "ours1", attached, host_flags(QUEUED), "file, config, greedy")
    found = [(file, row) for file, row in Comparison(tmp_path).rows() if row.unit == "tokens/s"]
    assert {file for file, _ in found} == {"offload.jsonl"}
    by_flags = {(row.metric, "offload" in row.flags): row for _, row in found}
    assert len(found) == len(by_flags) == 3
    row = by_flags["queue_rate", True]
    assert (row.value, row.baseline) == (40, 16) and row.simulated_acceptance
    for part in (
        "best with 3 sent at a time (8 with 8)",
        "10 fetches of 10.0 GB in all, link busy 50% of the time at 5.0 GB/s",
        "0 failed, 0 late, 0 cancelled",
        "slowest request 1.00 times the median",
    ):
        assert part in row.note, part
    row = by_flags["queue_rate_of_attached", True]
    assert (row.value, row.baseline) == (40, 32)
    assert by_flags["queue_rate", False].value == 32
    text = table("offload", [row for _, row in found])
    assert "| 2.50 | 2 |" in text and "| 1.25 | 0.99 |" in text


def test_with_offloading_and_without(monkeypatch, tmp_path):
    """Catches a comparison that is left out where the unmodified server was not measured."""
    for number, (name, seconds, flags) in enumerate(
        [("ours", 4.0, offload_flags(QUEUED)), ("ours1", 5.0, host_flags(QUEUED))]
    ):
        figures, _ = measured(monkeypatch, True, {8: seconds})
        write(tmp_path, number, name, figures, flags, "file, config, greedy")
    [(file, row)] = Comparison(tmp_path).rows()
    assert (file, row.metric) == ("offload.jsonl", "queue_rate_of_attached")
    assert (row.value, row.baseline) == (40, 32)
