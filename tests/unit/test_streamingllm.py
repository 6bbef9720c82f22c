"""StreamingLLM: the sinks and the last tokens, the same for all heads."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache.compressors.base import ScoreInputs
from sglang_vericache.compressors.scorers.streamingllm import StreamingLLM
from sglang_vericache.compressors.select import select_rows


@pytest.mark.parametrize(
    ("tokens", "rows", "start", "path_end", "kept"),
    [
        pytest.param(500, 100, 0, 500, [*range(4), *range(404, 500)], id="whole-path"),
        pytest.param(500, 68, 0, 500, [*range(4), *range(436, 500)], id="least"),
        pytest.param(480, 90, 0, 600, [*range(4), *range(394, 480)], id="shared-prefix"),
        pytest.param(120, 64, 480, 600, [*range(56, 120)], id="what-follows-it"),
        pytest.param(3, 3, 0, 3, [0, 1, 2], id="shorter-than-the-sinks"),
    ],
)
def test_keeps_sinks_and_the_last(tokens, rows, start, path_end, kept):
    """Catches an order that is turned round, and sinks counted from the interval."""
    inputs = ScoreInputs(torch.randn(tokens, 3, 8), None, start, 1.0, path_end=path_end)
    picks = select_rows(StreamingLLM().score(inputs), rows, start, path_end)
    assert picks.tolist() == [kept] * 3


def test_places_stay_apart_in_long_contexts():
    """Catches places counted in half precision."""
    scores = StreamingLLM().score(ScoreInputs(torch.zeros(300000, 1, 1).half(), None, 0, 1.0))
    assert scores.unique().numel() == 300000
