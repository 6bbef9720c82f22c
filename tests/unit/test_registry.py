"""The registry of compressors, and what every scorer in it promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sglang_vericache.compressors.base import ScoreInputs
from sglang_vericache.compressors.registry import SCORERS, create_scorer
from sglang_vericache.config import CompressorSpec, VeriCacheConfigError

TOKENS, HEADS, GROUP, DIM, WINDOW = 40, 3, 2, 16, 9


def create(text: str):
    return create_scorer(CompressorSpec.parse(text))


def test_unknown_name_lists_the_known():
    """Catches a list that is written by hand and misses a scorer."""
    with pytest.raises(VeriCacheConfigError) as error:
        create("h2o")
    assert "--vericache-compressor h2o" in str(error.value)
    for name in SCORERS:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "snapkv:size=3",
            r"no parameter 'size'.*window \(default 64\), kernel \(default 5\)",
        ),
        ("keydiff:window=3", "no parameter 'window'.*takes no parameters"),
        ("snapkv:window=abc", "window=abc is not a whole number"),
        ("snapkv:window=1.5", "window=1.5 is not a whole number"),
        ("snapkv:window=0", "window=0 must be at least 1"),
        ("snapkv:kernel=4", "kernel=4 must be odd"),
        ("snapkv:kernel=-1", "kernel=-1 must be odd and positive"),
    ],
)
def test_bad_parameter_gives_a_sentence(text, sentence):
    """Catches parameters that are ignored, or whose error does not say where they came from."""
    with pytest.raises(VeriCacheConfigError, match=f"^--vericache-compressor {text}: .*{sentence}"):
        create(text)


def test_parameters_reach_the_scorer():
    """Catches text that is never converted: a window of '32' slices nothing."""
    scorer = create("snapkv:window=32,kernel=7")
    assert (scorer.window, scorer.kernel, scorer.window_tokens) == (32, 7, 32)


@pytest.mark.parametrize("name", SCORERS)
def test_declarations(name):
    """Catches a scorer that asks for no window though it reads queries, or whose state changes."""
    scorer = create(name)
    assert scorer.name == name
    assert scorer.scope in ("node", "path")
    assert ("queries" in scorer.needs) == (scorer.window_tokens > 0)
    assert scorer.scope == "path" or "queries" not in scorer.needs
    assert dataclasses.is_dataclass(scorer) and scorer.__dataclass_params__.frozen


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_scores_are_finite_float32(name, dtype):
    """Catches sums in half precision, a wrong axis order, and inputs written in place."""
    inputs = ScoreInputs(
        keys=torch.randn(TOKENS, HEADS, DIM).to(dtype),
        values=torch.randn(TOKENS, HEADS, DIM).to(dtype),
        start=0,
        scaling=DIM**-0.5,
        queries=torch.randn(WINDOW, HEADS * GROUP, DIM).to(dtype),
        query_positions=torch.arange(TOKENS - WINDOW, TOKENS),
    )
    before = [inputs.keys.clone(), inputs.values.clone(), inputs.queries.clone()]
    scores = create(name).score(inputs)
    assert scores.shape == (HEADS, TOKENS)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    for old, new in zip(before, (inputs.keys, inputs.values, inputs.queries), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("name", [n for n, scorer in SCORERS.items() if scorer.scope == "node"])
def test_node_scope_does_not_know_where_it_stands(name):
    """Catches a scorer that calls itself shareable but depends on the path before the interval."""
    keys, values = torch.randn(2, TOKENS, HEADS, DIM)
    here = create(name).score(ScoreInputs(keys, values, 0, 1.0))
    there = create(name).score(ScoreInputs(keys, values, 5000, 1.0))
    assert torch.equal(here, there)
