"""Everything around the main job: settings, control by request and at run time, OpenAI clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import requests
from breadth import MIN_CONTEXT
from cases import Call
from conftest import TINY_FLAGS
from control_server import ControlledServer, call, controlled, info

from sglang_vericache.metrics import DraftCounters

pytestmark = pytest.mark.e2e

HORIZON = 8
TEXT = "Once upon a time there was a small random model that liked long prompts. " * 12
NEVER_ENDS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def config_file(logs) -> Path:
    path = logs / "vericache.yaml"
    path.write_text(f"horizon: {HORIZON}\nmin_context: 99\n")
    return path


@pytest.fixture(scope="module")
def running(tiny_model, logs, config_file) -> Iterator[ControlledServer]:
    environment = {
        "SGLANG_VERICACHE_CONFIG": str(config_file),
        "SGLANG_VERICACHE_HORIZON": "5",
        "SGLANG_VERICACHE_FOLD_TAIL": "128",
    }
    flags = (*TINY_FLAGS, "--vericache-min-context", str(MIN_CONTEXT))
    with controlled(tiny_model, logs / "control.log", flags, environment) as running:
        yield running


# Settings


def test_settings_with_their_sources(running, config_file):
    """Flag, file and environment each set what the stronger ones leave; all three endpoints and
    the log tell the same."""
    config = running.status()["config"]
    assert (config["min_context_tokens"], config["horizon"]) == (MIN_CONTEXT, HORIZON)
    assert (config["fold_tail_tokens"], config["keep_ratio"]) == (128, 0.2)
    sources = config["sources"]
    assert sources["min_context_tokens"] == "flag --vericache-min-context"
    assert sources["horizon"] == f"config file {config_file}: horizon"
    assert sources["fold_tail_tokens"] == "environment SGLANG_VERICACHE_FOLD_TAIL"
    assert sources["keep_ratio"] == "default"
    assert running.client.status()["config"] == config
    line = next(x for x in running.log.read_text().splitlines() if "vericache settings:" in x)
    assert f"horizon={HORIZON} (config file" in line and "keep_ratio=0.2 (default)" in line


# Control by request


@pytest.fixture(scope="module")
def plainly(running) -> dict[int, dict]:
    """Replies to prompts by length, decoded without drafting."""
    return {n: running.generate(call(n), {"enabled": False}) for n in (300, 700)}


def test_disabled_by_request(plainly):
    for reply in plainly.values():
        assert info(reply).plain == {"disabled_by_request": 59}
        assert (info(reply).rounds, info(reply).draft_rows_read) == (0, 0)
        assert not [key for key in reply["meta_info"] if key.startswith("spec_")]


@pytest.mark.parametrize("length", [300, 700])
@pytest.mark.parametrize(
    "options",
    [
        *(None, {}, {"enabled": True}, {"horizon": 1}, {"horizon": 3}, {"horizon": HORIZON}),
        *({"keep_ratio": 0.02}, {"keep_ratio": 0.5}, {"keep_ratio": 1}),
        {"keep_ratio": 0.9, "horizon": 2, "enabled": True},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_options(running, plainly, options, length):
    reply = running.generate(call(length), options)
    assert reply["output_ids"] == plainly[length]["output_ids"]
    counters = info(reply)
    assert counters.rounds > 0 and counters.tokens == 59
    horizon = (options or {}).get("horizon", HORIZON)
    assert counters.drafted <= horizon * counters.rounds
    if "horizon" in (options or {}):
        assert counters.drafted >= horizon * (counters.rounds - 2), "drafts less than it may"


def test_keep_ratio_is_the_requests_own(running):
    """More is kept, more is read, and more stands; a generous span serves a modest request, a
    modest one no generous request."""
    by_ratio = {}
    for ratio in (0.1, 0.8):
        counters = info(running.generate(call(700), {"keep_ratio": ratio}))
        by_ratio[ratio] = counters.draft_rows_read / counters.drafted
    assert by_ratio[0.1] < 0.2 * 800 and 0.75 * 700 < by_ratio[0.8] < 800
    spans = running.status()["spans"]
    modest = info(running.generate(call(700), {"keep_ratio": 0.1}, flush=False))
    assert modest.draft_rows_read / modest.drafted > 0.75 * 700
    assert running.status()["spans"]["reused"] == spans["reused"] + 1
    running.generate(call(700), {"keep_ratio": 0.9}, flush=False)
    after = running.status()["spans"]
    assert (after["reused"], after["built"]) == (spans["reused"] + 1, spans["built"] + 1)


REFUSED = [
    (None, "vericache is null: accepted is an object"),
    ("off", 'vericache is "off": accepted is an object'),
    ([True], "accepted is an object"),
    ({"enable": False}, "Did you mean enabled?"),
    ({"enabled": "false"}, "accepted is true or false"),
    ({"enabled": {"deep": {"er": 1}}}, "accepted is true or false"),
    ({"keep_ratio": 0}, "accepted is a number in (0, 1]"),
    ({"keep_ratio": "much"}, "accepted is a number in (0, 1]"),
    ({"horizon": HORIZON + 1}, f"from 1 to {HORIZON}, the server's --vericache-horizon"),
    ({"horizon": 2.5}, "accepted is a whole number"),
    ({"horizon": [[[1]]]}, "accepted is a whole number"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=lambda value: str(value)[:30])
def test_bad_options_are_refused(running, options, sentence):
    """HTTP 400 with the sentence on every way in, and the next request is served."""
    native = call(100).body()
    native["sampling_params"]["custom_params"] = {"vericache": options}
    common = {"model": "m", "max_tokens": 4, "temperature": 0}
    chat = common | {"messages": [{"role": "user", "content": "Hello"}]}
    completion = common | {"prompt": "Hello"}
    for path, body in (
        ("/generate", native),
        ("/v1/completions", completion | {"custom_params": {"vericache": options}}),
        ("/v1/completions", completion | {"vericache": options}),
        ("/v1/completions", completion | {"vericache": options, "stream": True}),
        ("/v1/chat/completions", chat | {"vericache": options}),
        ("/v1/chat/completions", chat | {"vericache": options, "stream": True}),
    ):
        response = requests.post(running.url + path, json=body, timeout=60)
        assert response.status_code == 400, (path, response.text)
        assert sentence in response.text.replace("\\", ""), (path, response.text)
    assert info(running.generate(call(300, 20))).rounds > 0


def test_batch_with_one_bad_request(running):
    """A list of prompts is refused as a whole and leaves nothing behind."""
    body = {"input_ids": [[500] * 100, [600] * 100]}
    params = {"max_new_tokens": 4, "temperature": 0}
    bad = params | {"custom_params": {"vericache": {"horizon": 0}}}
    response = requests.post(
        running.url + "/generate", json=body | {"sampling_params": [params, bad]}, timeout=60
    )
    assert response.status_code == 400 and "vericache.horizon is 0" in response.text
    assert len(running.client.post("/generate", body | {"sampling_params": [params, params]})) == 2
    assert running.status()["requests"] == 0


def test_a_ratio_that_no_row_holds(running):
    """The server's rows have room for a fifth of the longest context, 8192 tokens."""
    body = call(3000, 4).body()
    body["sampling_params"]["custom_params"] = {"vericache": {"keep_ratio": 0.9}}
    response = requests.post(running.url + "/generate", json=body, timeout=60)
    assert response.status_code == 400 and "rows have room for 1639" in response.text


# OpenAI


def of_chat(running, options: dict | None, **more):
    return running.openai().chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=40,
        temperature=0,
        extra_body=NEVER_ENDS | ({"vericache": options} if options is not None else {}),
        **more,
    )


def of_completion(running, options: dict | None, **more):
    extra = NEVER_ENDS | {"return_token_ids": True}
    return running.openai().completions.create(
        model="m",
        prompt=TEXT,
        max_tokens=40,
        temperature=0,
        extra_body=extra | ({"vericache": options} if options is not None else {}),
        **more,
    )


@pytest.mark.parametrize("ask", [of_chat, of_completion])
def test_openai_client(running, ask):
    """Options in, counters out; the text does not depend on them."""

    def text(reply) -> str:
        choice = reply.choices[0]
        return choice.message.content if ask is of_chat else choice.text

    drafted, off = ask(running, {"horizon": 3}), ask(running, {"enabled": False})
    assert text(drafted) == text(off) == text(ask(running, None))
    counters = DraftCounters.parse(drafted.sglext["vericache"])
    assert counters.tokens == 39 and 0 < counters.drafted <= 3 * counters.rounds
    assert off.sglext["vericache"]["plain"] == {"disabled_by_request": 39}
    with pytest.raises(openai.BadRequestError, match="Did you mean horizon"):
        ask(running, {"horizn": 3})


@pytest.mark.parametrize("usage", [False, True], ids=["", "usage"])
@pytest.mark.parametrize("ask", [of_chat, of_completion])
def test_openai_client_streaming(running, ask, usage):
    """The last chunk has the counters, every chunk has a choice unless it tells the usage, and
    none but the first and the last comes without news."""
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(ask(running, {"horizon": 4}, stream=True, **options))
    counters = DraftCounters.parse(chunks[-1].sglext["vericache"])
    assert counters.tokens == 39 and 0 < counters.drafted <= 4 * counters.rounds
    assert not any(getattr(chunk, "sglext", None) for chunk in chunks[:-1])
    body, tail = (chunks[:-1], chunks[-1:]) if usage else (chunks, [])
    assert all(len(chunk.choices) == 1 for chunk in body)
    assert all(chunk.usage.completion_tokens == 40 and not chunk.choices for chunk in tail)
    assert [c.choices[0].finish_reason for c in body] == [None] * (len(body) - 1) + ["length"]
    whole = ask(running, {"enabled": False})
    if ask is of_chat:
        parts = [chunk.choices[0].delta.content for chunk in body]
        assert "".join(filter(None, parts)) == whole.choices[0].message.content
        assert all(parts[1:-1]), "an empty chunk"
    else:
        assert "".join(chunk.choices[0].text for chunk in body) == whole.choices[0].text
        sizes = [len(chunk.choices[0].token_ids) for chunk in body]
        assert sum(sizes) == 40 and min(sizes) > 0 and max(sizes) > 1


def test_openai_several_choices(running):
    """A record for each choice, in their order."""
    reply = of_completion(running, None, n=2)
    records = reply.sglext["vericache"]
    assert [DraftCounters.parse(record).tokens for record in records] == [39, 39]
    *_, last = of_completion(running, None, n=2, stream=True)
    assert len(last.sglext["vericache"]) == 2


# The switch


def stream(running, long: Call):
    """Chunks as they come."""
    return running.client.chunks(long.body())


def test_switching_in_mid_stream(running):
    """Off and on again while requests run and others arrive: no token changes."""
    long, other = call(500, 400), call(200, 60)
    expected = running.generate(long, {"enabled": False})["output_ids"]
    expected_other = running.generate(other, {"enabled": False})["output_ids"]
    running.client.flush()
    phases, seen, last = [], 0, None
    for last in stream(running, long):
        count = last["meta_info"]["completion_tokens"]
        if len(phases) == 0 and count > 60:
            phases.append(running.switch(False))
            seen = count
        elif len(phases) == 1 and count > seen + 60:
            assert running.generate(other, flush=False)["output_ids"] == expected_other
            phases.append(running.switch(True))
    assert [status["drafting"] for status in phases] == [False, True]
    assert phases[0]["draft_pool"]["used_tokens"] == phases[0]["spans"]["owned_tokens"]
    assert last["output_ids"] == expected
    counters = info(last)
    assert set(counters.plain) <= {"switched_off", "end_of_output", "awaits_checkpoint"}
    assert counters.plain["switched_off"] >= 60 and counters.tokens == 399
    assert counters.rounds > 10


def test_switched_off_before_it_starts(running):
    """Nothing is drafted, and SGLang's averages have nothing to say."""
    running.switch(False)
    try:
        reply = running.generate(call(300))
        assert info(reply).plain == {"switched_off": 59}
        assert running.status()["drafting"] is False
        assert running.status()["draft_pool"]["used_tokens"] == 0
    finally:
        running.switch(True)
    assert info(running.generate(call(300))).rounds > 0


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"drafting": 1}, "drafting is 1"),
        ({"on": True}, "Key 'on' is not known"),
        ([], "not an object"),
    ],
)
def test_bad_switch(running, body, sentence):
    response = requests.post(running.url + "/vericache", json=body, timeout=60)
    assert response.status_code == 400
    assert sentence in response.text
    assert running.status()["drafting"] is True
