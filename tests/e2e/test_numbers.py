"""Numbers: responses, metrics endpoint and SGLang's own speculative counters agree.

The server has two tokenizer processes, each of which answers some of the requests: SGLang loads
no plugins in these, and the records, checks and routes must be there all the same.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from breadth import ANY_END, tokens
from cases import Call
from conftest import DRAFT_FLAGS, TINY_FLAGS
from control_server import ControlledServer, call, controlled, info
from metrics import Samples

from sglang_vericache.metrics import DraftCounters
from sglang_vericache.prometheus import METRICS, PREFIX

pytestmark = pytest.mark.e2e

HORIZON = 8
# Enough that both processes answer some.
BOTH = 8


@pytest.fixture(scope="module")
def running(tiny_model, logs) -> Iterator[ControlledServer]:
    flags = (
        *(*TINY_FLAGS, *DRAFT_FLAGS, "--vericache-horizon", str(HORIZON)),
        *("--enable-metrics", "--decode-log-interval", "1", "--tokenizer-worker-num", "2"),
    )
    # A process that answers has to import SGLang first, which takes two busy cores longer than the
    # ten seconds that it is given.
    patience = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "120"}
    with controlled(tiny_model, logs / "numbers.log", flags, patience) as running:
        yield running


def test_every_process_controls(running):
    """Refusals, records and routes, whichever process answers: connections are new each time."""
    for _ in range(BOTH):
        reply = running.generate(call(200, 20), {"horizon": 2}, flush=False)
        assert 0 < info(reply).drafted <= 2 * info(reply).rounds
        assert running.status()["config"]["horizon"] == HORIZON
        with pytest.raises(AssertionError, match=r"answered 400: .*vericache\.horizon is 9"):
            running.generate(call(200, 20), {"horizon": 9}, flush=False)
        reply = running.openai().completions.create(
            model="m", prompt="x " * 99, max_tokens=9, extra_body={"vericache": {"enabled": False}}
        )
        assert "disabled_by_request" in reply.sglext["vericache"]["plain"]
        with pytest.raises(openai.BadRequestError, match="Did you mean horizon"):
            running.openai().completions.create(
                model="m", prompt="x", extra_body={"vericache": {"horizn": 3}}
            )
    for on in (False, True, False, True):
        assert running.switch(on)["drafting"] is on is running.status()["drafting"]


def settled(running, rounds: int, plain: int) -> Samples:
    """A scrape that has counted so many rounds and plain tokens: a response is sent before its
    last step is exported."""
    for _ in range(50):
        samples = Samples(running.url)
        counted = (samples.value(PREFIX + "rounds_total"), plain_tokens(samples))
        if counted[0] >= rounds and counted[1] >= plain:
            return samples
        time.sleep(0.1)
    raise AssertionError(f"{counted} rounds and plain tokens of {rounds} and {plain}")


def plain_tokens(samples: Samples) -> float:
    return sum(samples.by(PREFIX + "plain_tokens_total", "reason").values())


def test_metrics_agree_with_the_responses(running):
    """Sums over responses equal what the endpoint counted meanwhile, stops inside of rounds
    included; SGLang's own counters agree."""
    calls = [call(n, 50) for n in (90, 250, 251, 400, 900)]
    replies = [running.generate(c) for c in calls]
    texts = [reply["text"][20:26] for reply in replies]
    stops = [
        Call(f"{c.name}/stop", c.prompt, 50, ANY_END | {"stop": [text]})
        for c, text in zip(calls, texts, strict=True)
    ]
    special = [
        Call("penalty", tokens(1, 120), 20, ANY_END | {"frequency_penalty": 1.0}),
        Call("short", tokens(2, 20), 30, ANY_END),
    ]
    totals = running.status()["totals"]
    before = settled(running, totals["rounds"], sum(totals["plain"].values()))
    running.client.flush()
    with ThreadPoolExecutor(4) as pool:
        replies = list(
            pool.map(lambda c: running.generate(c, flush=False), calls + stops + special)
        )
    total = DraftCounters()
    for reply in replies:
        total.add(info(reply))
    after = settled(
        running,
        int(before.value(PREFIX + "rounds_total")) + total.rounds,
        int(plain_tokens(before)) + sum(total.plain.values()),
    )

    def grown(name: str) -> float:
        return after.value(PREFIX + name) - before.value(PREFIX + name)

    def grown_by(name: str, label: str) -> dict[str, float]:
        news = Counter(after.by(PREFIX + name, label))
        news.subtract(before.by(PREFIX + name, label))
        return {key: value for key, value in news.items() if value}

    assert grown("rounds_total") == total.rounds > 20
    assert grown("drafted_tokens_total") == total.drafted
    assert grown("accepted_tokens_total") == total.accepted
    assert grown("tokens_per_round_count") == total.rounds
    assert grown("tokens_per_round_sum") == total.round_tokens
    assert grown_by("plain_tokens_total", "reason") == total.plain
    records = [reply["meta_info"]["vericache"] for reply in replies]
    read = grown_by("kv_read_bytes_total", "cache")
    assert read.keys() == {"draft", "full"}
    assert sum(read.values()) == sum(record["bytes_read"] for record in records)
    assert grown("kv_plain_bytes_total") == sum(record["bytes_full"] for record in records)
    status = running.status()
    assert after.value(PREFIX + "spans_built_total") == status["spans"]["built"]
    assert after.value(PREFIX + "draft_pool_tokens") == status["draft_pool"]["tokens"]
    phases = grown_by("phase_seconds_total", "phase")
    assert phases.keys() == {"build", "draft", "verify", "plain", "commit"}
    calls_of_sglang = "sglang:spec_verify_calls_total"
    assert after.value(calls_of_sglang) - before.value(calls_of_sglang) == total.rounds
    for metric in METRICS:
        name = metric.full_name + ("_count" if metric.kind == "histogram" else "")
        assert name in after, name


def test_bytes_follow_the_rows(running):
    """3 layers of 2 heads, key and value of 32 float32 each: 1536 bytes a row of either pool."""
    record = running.generate(call(700))["meta_info"]["vericache"]
    assert record["bytes_read"] == 1536 * (record["draft_rows_read"] + record["full_rows_read"])
    assert record["bytes_full"] == 1536 * record["rows_full"]
    assert 0 < record["draft_rows_read"] and record["bytes_read"] < record["bytes_full"]


def test_sglangs_own_speculative_numbers(running):
    """They count rounds: not the plain tokens beside them, nor the first from the prefill."""
    meta = running.generate(call(300))["meta_info"]
    counters = DraftCounters.parse(meta["vericache"])
    assert meta["spec_verify_ct"] == counters.rounds
    assert meta["spec_num_correct_drafts"] == counters.accepted
    assert meta["spec_num_proposed_drafts"] == counters.drafted
    assert meta["spec_accept_length"] == pytest.approx(counters.round_tokens / counters.rounds)
    assert meta["spec_accept_rate"] == pytest.approx(counters.accepted / counters.drafted)
    histogram = meta["spec_correct_drafts_histogram"]
    assert sum(histogram) == counters.rounds
    assert sum(n * rounds for n, rounds in enumerate(histogram)) == counters.accepted


def test_sglangs_log_and_average_count_rounds(running):
    """A log line without a round says 0 and no other is below 1; the average since the cache was
    flushed is that of the rounds."""
    running.switch(False)
    running.generate(call(90, 10))
    running.switch(True)
    counters = info(running.generate(call(300)))
    # The last step is reported after its response.
    for _ in range(50):
        average = running.client.info()["internal_states"][0]["avg_spec_accept_length"]
        if average == pytest.approx(counters.tokens_per_round):
            break
        time.sleep(0.1)
    assert average == pytest.approx(counters.tokens_per_round)
    lengths = re.findall(r"accept len: ([0-9.]+)", running.log.read_text())
    lengths = [float(x) for x in lengths]
    assert 0 in lengths and all(x == 0 or 1 <= x <= HORIZON + 1 for x in lengths)
    assert max(lengths) > 1


def test_queries_of_a_prompt_that_asked_for_one_token(running):
    """Catches a prompt whose queries are lost because it was not drafted from: who continues it
    would be scored without."""
    before = running.status()["spans"]
    asked = call(310, 1)
    running.generate(asked)
    reply = running.generate(replace(call(310, 24), prompt=asked.prompt), flush=False)
    after = running.status()["spans"]
    assert info(reply).rounds > 0
    assert after["scored_with_stored"] > before["scored_with_stored"]
    assert after["scored_without"] == before["scored_without"]
