"""The registry of compressors: names and parameters, as the flag gives them."""

from __future__ import annotations

import pytest

from sglang_vericache.compressors.registry import SCORERS, create_scorer
from sglang_vericache.config import CompressorSpec, VeriCacheConfigError


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
        ("streamingllm:sinks=4", "no parameter 'sinks'.*takes no parameters"),
        ("knorm:p=1", "no parameter 'p'.*takes no parameters"),
        ("expected_attention:n=3", r"no parameter 'n'.*Known: future \(default 512\)"),
        ("expected_attention:future=0", "future=0 must be at least 1"),
    ],
)
def test_bad_parameter_gives_a_sentence(text, sentence):
    """Catches parameters that are ignored, or whose error does not say where they came from."""
    with pytest.raises(VeriCacheConfigError, match=f"^--vericache-compressor {text}: .*{sentence}"):
        create(text)


def test_parameters_reach_the_scorer():
    """Catches text that is never converted: a window of '32' slices nothing."""
    scorer = create("snapkv:window=32,kernel=7")
    assert (scorer.window, scorer.kernel, scorer.watch.tokens) == (32, 7, 32)
