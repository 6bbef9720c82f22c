"""The sentence about an unknown name."""

from __future__ import annotations

import pytest

from sglang_vericache.nearest import unknown

KEYS = ["compressor", "keep_ratio", "keep_tokens", "horizon", "draft_memory"]
VARIABLES = ["SGLANG_VERICACHE_HORIZON", "SGLANG_VERICACHE_KEEP_RATIO"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("horizn", "horizon"),
        ("keep-ratio", "keep_ratio"),
        ("keepratio", "keep_ratio"),
        ("Horizon", "horizon"),
        ("vericache_keep_tokens", "keep_tokens"),
        ("--vericache-draft-memory", "draft_memory"),
    ],
)
def test_nearest(name, nearest):
    """Catches spellings with a flag's or variable's prefix that are found near nothing."""
    sentence = unknown("key", name, KEYS)
    assert f"key {name!r} is not known. Did you mean {nearest}?" in sentence
    assert sentence.endswith(f"Known: {', '.join(KEYS)}.")


def test_variables():
    """Catches a common prefix that makes all variables alike."""
    sentence = unknown("variable", "SGLANG_VERICACHE_HORIZN", VARIABLES)
    assert "Did you mean SGLANG_VERICACHE_HORIZON?" in sentence
    assert "Did you mean" not in unknown("variable", "SGLANG_VERICACHE_Q", VARIABLES)


def test_nothing_near():
    """Catches a guess that has nothing to do with what was typed."""
    assert "Did you mean" not in unknown("key", "temperature_of_water", KEYS)
