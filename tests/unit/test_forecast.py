"""What `plan` foresees follows from bytes, and from the very policy that the server uses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sglang_vericache.cli import main
from sglang_vericache.config import VeriCacheConfigError
from sglang_vericache.forecast.costs import costs_of, pool_tokens
from sglang_vericache.forecast.hardware import CARDS, card_named
from sglang_vericache.forecast.load import Draft, Load
from sglang_vericache.forecast.shape import KNOWN, shape_of
from sglang_vericache.forecast.simulate import (
    simulate_attached,
    simulate_offload,
    simulate_plain,
)
from sglang_vericache.loader.planner import Costs
from sglang_vericache.rounds.step_watch import StepWatch

H100 = CARDS["h100"]


def test_plain_decoding_is_limited_by_bytes():
    """12 requests of 32K on the 8B model: 542 tokens/s by bytes alone, less with the forwards'
    and the scheduler's own time."""
    shape = KNOWN["llama-3.1-8b"]
    load = Load(12, 32_768, 512)
    found = simulate_plain(shape, H100, load, 12 * 33_300)
    by_bytes = 12 * H100.memory_rate / (shape.weight_bytes + 12 * 32_768 * shape.token_bytes)
    assert found.together == 12
    assert 0.85 * by_bytes < found.tokens_per_s < by_bytes


def test_a_pool_that_is_small_beside_the_weights():
    """24B, 16K, a pool of 40K tokens: all eight run, the link works, and it is faster."""
    shape, load, draft = KNOWN["mistral-small-24b"], Load(8, 16_384, 512), Draft(16, 11.0, 0.06)
    plain = simulate_plain(shape, H100, load, 40_000)
    attached = simulate_attached(shape, H100, load, 40_000, draft)
    offload = simulate_offload(shape, H100, load, 40_000, draft)
    assert (plain.together, attached.together, offload.together) == (2, 2, 8)
    assert offload.tokens_per_s > 1.5 * plain.tokens_per_s
    assert attached.tokens_per_s == plain.tokens_per_s, "the controller decodes plainly"
    assert offload.detached > 100 and offload.link_use > 0.7 and offload.slowest < 1.5


def test_two_paths_side_by_side():
    """Catches requests whose outputs take the room of the second path: the link would idle while
    the only path is verified."""
    shape, draft = KNOWN["mistral-small-24b"], Draft(16, 11.0, 0.06)
    rates = []
    for requests in (5, 8):
        load = Load(requests, 16_384, 512)
        found = simulate_offload(shape, H100, load, 36_000, draft)
        assert found.together == 5
        rates.append(found.tokens_per_s)
    assert rates[1] > 0.8 * rates[0]


@pytest.mark.parametrize("model", ["llama-3.1-8b", "smollm2-135m", "mistral-small-24b"])
@pytest.mark.parametrize("requests", [10, 100, pytest.param(10_000, marks=pytest.mark.long)])
def test_offloading_costs_nothing_where_it_does_not_pay(model, requests):
    """Catches rotation that is chosen although it is slower than keeping everything attached."""
    shape, draft = KNOWN[model], Draft(16, 11.0, 0.06)
    load = Load(requests, 8_000, 128)
    capacity = pool_tokens(shape, H100)
    attached = simulate_attached(shape, H100, load, capacity, draft)
    offload = simulate_offload(shape, H100, load, capacity, draft)
    assert offload.tokens_per_s >= 0.99 * attached.tokens_per_s
    if not costs_of(shape, H100, load, capacity, draft).pays:
        # The longer drafts of requests that wait keep a little more room free.
        assert offload.detached == 0 and offload.together >= 0.99 * attached.together


def test_a_faster_link_never_hurts():
    shape, load, draft = KNOWN["mistral-small-24b"], Load(16, 32_768, 256), Draft(16, 11.0, 0.06)
    rates = [
        simulate_offload(shape, card, load, 120_000, draft).tokens_per_s
        for card in (replace(H100, link_rate=n * H100.link_rate) for n in (1, 2, 8))
    ]
    assert rates == sorted(rates) and rates[-1] > 1.2 * rates[0]


def test_costs():
    """Room for a path brings a verify a round in one case, one a fetch and two steps in the
    other."""
    assert Costs(2, round_s=0.295, step_s=0.0185, forward_s=0.0165, fetch_s=0.05).pays
    assert not Costs(12, round_s=0.14, step_s=0.035, forward_s=0.006, fetch_s=0.08).pays
    assert not Costs(50, round_s=0.14, step_s=0.035, forward_s=0.006, fetch_s=0.02).pays
    # Two requests that decode plainly, or in short rounds, against whole rounds over the link.
    rates = {"step_s": 0.03, "forward_s": 0.013, "fetch_s": 0.06}
    assert Costs(2, 0.014, **rates, kept_tokens=1.0, fetched_tokens=13.0).pays
    assert not Costs(2, 0.014, **rates).pays


@pytest.mark.parametrize(
    ("fits", "fetch_s", "running", "staged"),
    [
        pytest.param(2, 0.06, None, 2, id="the-whole-of-a-small-pool"),
        pytest.param(9, 0.06, None, 3, id="as-many-as-keep-the-link-busy"),
        pytest.param(9, 0.5, None, 1, id="a-slow-link"),
        pytest.param(9, 0.06, 10, 1, id="one-too-many"),
        pytest.param(1, 0.06, 8, 1, id="one-at-a-time"),
    ],
)
def test_how_many_are_staged(fits, fetch_s, running, staged):
    """Catches a share of the pool that lets the link idle while one path waits for its verify, and
    one that takes room from those who stay for nothing."""
    costs = Costs(fits, round_s=0.4, step_s=0.06, forward_s=0.012, fetch_s=fetch_s)
    assert costs.staged(running) == staged
    best = max(costs.rate(n, running) for n in range(1, fits + 1))
    assert costs.rate(staged, running) == best


@pytest.mark.parametrize(
    ("fits", "fetch_s", "share"),
    [
        pytest.param(2, 0.056, 1, id="two-paths-and-a-large-model"),
        pytest.param(2, 0.56, 20, id="a-slow-link"),
        pytest.param(30, 0.004, 3, id="many-short-paths"),
        pytest.param(1, 0.5, 1, id="one-at-a-time"),
    ],
)
def test_steps_that_the_link_need_not_wait_for(fits, fetch_s, share):
    """Catches steps so long that every path in the staging share waits for one to end."""
    costs = Costs(fits, round_s=0.4, step_s=0.06, forward_s=0.013, fetch_s=fetch_s)
    assert costs.share == share


def test_who_waits_for_the_link_brings_more():
    """Catches a rotation that is refused, or room for paths that is not given, because a fetch is
    taken to bring a horizon's tokens however long one waits for it."""
    rates = {"step_s": 0.06, "forward_s": 0.013, "fetch_s": 0.09}
    costs = Costs(5, 0.243, **rates, kept_tokens=13.0, fetched_tokens=13.0)
    deep = replace(costs, deep_tokens=21.5)
    assert not costs.pays and deep.pays
    assert deep.rate(1) > costs.rate(1)
    # Nobody waits: every one is verified once a round.
    assert deep.rate(1, 5) == costs.rate(1, 5)
    assert costs.rate(1, 16) < deep.rate(1, 16) <= deep.rate(1)


def test_tokens_of_longer_rounds():
    draft = Draft(15, 11.0)
    assert draft.deepest == 31 and draft.tokens(15) == pytest.approx(11.0, rel=1e-6)
    assert 11.0 < draft.tokens(31) < 22.0 and draft.tokens(0) == 1.0


def test_step_watch():
    """Catches a prefill that is taken for a step or a round, and rounds of different requests
    that are mixed up."""
    now = [0.0]
    watch = StepWatch(1.0, 16, clock=lambda: now[0])
    committed = {"a": 100, "b": 100, "c": 100}

    def step(seconds, *turns, whole=()):
        watch.step(committed, turns, whole, 4)
        now[0] += seconds
        for rid in {*turns, *whole}:
            committed[rid] += 13 if rid in whole else 5

    for _ in range(5):
        step(0.1, "a")
        step(0.1, "b")
    assert watch.step_s == pytest.approx(0.1) and watch.round_s == pytest.approx(0.2)
    assert watch.forward_s == pytest.approx(0.025)
    watch.interrupt()
    now[0] += 100
    step(0.1, "a", "b")
    step(0.1)
    assert watch.step_s == pytest.approx(0.1) and watch.round_s == pytest.approx(0.2)
    assert watch.round_tokens == pytest.approx(5) and watch.whole_tokens == 9
    for _ in range(50):
        step(0.1, whole=["c"])
    step(0.1)
    assert watch.whole_tokens == pytest.approx(13, abs=0.1)
    assert watch.round_tokens == pytest.approx(5)


@pytest.mark.parametrize(("attached", "rotating"), [(10, 8), (8, 10)])
def test_rotation_that_brings_less(attached, rotating):
    """Catches rotation that goes on although the same requests were faster before, whatever was
    foreseen; steps in which nobody waits that count for either; and old rates."""
    now = [0.0]
    watch = StepWatch(1.0, 16, clock=lambda: now[0])
    committed = {"a": 100, "b": 100}

    def steps(count, kind, tokens):
        for _ in range(count):
            watch.step(dict(committed), (), (), 1, kind)
            now[0] += 0.1
            for rid in committed:
                committed[rid] += tokens

    steps(30, None, 1000)
    steps(30, False, attached)
    assert not watch.rotation_loses, "nobody has rotated yet"
    steps(9, True, rotating)
    assert not watch.rotation_loses, "too little was seen"
    watch.interrupt()
    now[0] += 20
    steps(9, True, rotating)
    assert watch.rotation_loses == (rotating < attached)
    steps(30, None, 0)
    assert watch.rotation_loses == (rotating < attached)
    now[0] += 31
    assert not watch.rotation_loses, "requests may be others by now"
    steps(30, True, 1)
    assert not watch.rotation_loses
    steps(20, False, 2)
    assert watch.rotation_loses


# Models and cards


def test_shapes_of_a_folder(tmp_path):
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, known = shape_of(str(tmp_path)), KNOWN["llama-3.1-8b"]
    assert found.token_bytes == known.token_bytes
    assert found.weight_bytes == pytest.approx(known.weight_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ("{}", "has no num_hidden_layers"),
        (
            '{"num_hidden_layers": 1, "hidden_size": 1, "num_attention_heads": 1, '
            '"intermediate_size": 1, "vocab_size": 1, "kv_lora_rank": 512}',
            "MLA",
        ),
    ],
)
def test_models_it_cannot_foresee(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(VeriCacheConfigError, match=sentence):
        shape_of(str(tmp_path))


def test_unknown_names():
    with pytest.raises(VeriCacheConfigError, match="smollm2-135m"):
        shape_of("no-such-model")
    with pytest.raises(VeriCacheConfigError, match="h100, h200"):
        card_named("b9000")


# The command


def test_plan(capsys):
    assert main(["plan", "--model", "llama-3.1-8b", "--gpu", "h100", "--requests", "8"]) == 0
    out = capsys.readouterr().out
    assert "plain" in out and "1.00x" in out and "Rotation" in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--context", "9999999"], "does not fit"),
        (["--kept", "0"], "outside (0, 1]"),
        (["--tokens-per-round", "30"], "at most 16"),
        (["--prefixes", "3"], "go together"),
        (["--requests", "0"], "at least 1"),
        (["--gpu", "abacus"], "Accepted: h100"),
    ],
)
def test_plan_refuses(capsys, options, sentence):
    command = ["plan", "--model", "llama-3.1-8b", "--gpu", "h100", *options]
    assert main(command) == 2
    assert sentence in capsys.readouterr().err
