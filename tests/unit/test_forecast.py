"""What `plan` foresees follows from bytes, and from the very policy that the server uses."""

from __future__ import annotations

import json

import pytest

from sglang_vericache.cli import main
from sglang_vericache.config import VeriCacheConfigError
from sglang_vericache.forecast.hardware import CARDS, card_named
from sglang_vericache.forecast.shape import KNOWN, shape_of
from sglang_vericache.forecast.simulate import (
    Draft,
    Load,
    costs_of,
    pool_tokens,
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
    assert offload.tokens_per_s > 1.3 * plain.tokens_per_s
    assert offload.tokens_per_s > 1.5 * attached.tokens_per_s
    assert offload.link_use > 0.4 and offload.slowest < 1.5


@pytest.mark.parametrize("model", ["llama-3.1-8b", "smollm2-135m", "mistral-small-24b"])
@pytest.mark.parametrize("requests", [10, 100, pytest.param(10_000, marks=pytest.mark.long)])
def test_offloading_costs_nothing_where_it_does_not_pay(model, requests):
    """Catches rotation that is chosen although it is slower than keeping everything attached."""
    shape, draft = KNOWN[model], Draft(16, 11.0, 0.06)
    load = Load(requests, 8_000, 128)
    capacity = pool_tokens(shape, H100, 0.06)
    attached = simulate_attached(shape, H100, load, capacity, draft)
    offload = simulate_offload(shape, H100, load, capacity, draft)
    assert offload.tokens_per_s >= 0.99 * attached.tokens_per_s
    if not costs_of(shape, H100, load, capacity, draft).pays:
        assert offload == attached


def test_a_faster_link_never_hurts():
    shape, load, draft = KNOWN["mistral-small-24b"], Load(16, 32_768, 256), Draft(16, 11.0, 0.06)
    rates = [
        simulate_offload(shape, card, load, 120_000, draft).tokens_per_s
        for card in (
            H100,
            type(H100)("x2", H100.memory_bytes, H100.memory_rate, 2 * H100.link_rate, ""),
            type(H100)("x8", H100.memory_bytes, H100.memory_rate, 8 * H100.link_rate, ""),
        )
    ]
    assert rates == sorted(rates) and rates[-1] > 1.2 * rates[0]


def test_costs():
    """Room for a path brings a verify a round in one case, one a fetch and two steps in the
    other."""
    assert Costs(2, round_s=0.295, step_s=0.0185, forward_s=0.0165, fetch_s=0.05).pays
    assert not Costs(12, round_s=0.14, step_s=0.035, forward_s=0.006, fetch_s=0.08).pays
    assert not Costs(50, round_s=0.14, step_s=0.035, forward_s=0.006, fetch_s=0.02).pays
    assert Costs(9, 1.0, step_s=0.05, forward_s=0.01, fetch_s=0.01).staged == 6
    assert Costs(3, 1.0, step_s=0.05, forward_s=0.01, fetch_s=0.01).staged == 3
    assert Costs(9, 1.0, step_s=0.05, forward_s=0.01, fetch_s=0.5).staged == 2


def test_step_watch():
    """Catches a prefill that is taken for a step or a round, and rounds of different requests
    that are mixed up."""
    now = [0.0]
    watch = StepWatch(1.0, clock=lambda: now[0])

    def step(seconds, *verified):
        watch.step(verified, 4)
        now[0] += seconds

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
        (["--tokens-per-round", "30"], "at most 17"),
        (["--prefixes", "3"], "go together"),
        (["--requests", "0"], "at least 1"),
        (["--gpu", "abacus"], "Accepted: h100"),
    ],
)
def test_plan_refuses(capsys, options, sentence):
    command = ["plan", "--model", "llama-3.1-8b", "--gpu", "h100", *options]
    assert main(command) == 2
    assert sentence in capsys.readouterr().err
