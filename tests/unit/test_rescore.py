"""Rescoring outputs by the unmodified server."""

from __future__ import annotations

import pytest

from benchmarks.serving.rescore import Rescored, distances


def meta(chosen, best) -> dict:
    """As SGLang answers: the first place, the prompt's last token, has no log-probability."""
    return {
        "input_token_logprobs": [[None, 9, None], *([p, t, None] for p, t in chosen)],
        "input_top_logprobs": [None, *([[p, t, None]] for p, t in best)],
    }


def test_distances():
    """Catches places that are one off."""
    answer = meta([(-0.1, 5), (-1.5, 6)], [(-0.1, 5), (-1.2, 7)])
    assert distances(answer, [5, 6]) == pytest.approx([0.0, 0.3])


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match="other tokens"):
        distances(meta([(-0.1, 5)], [(-0.1, 5)]), [4])


def test_near_ties_and_mismatches():
    """Catches a runner-up far below that counts as a tie."""
    result = Rescored()
    result.add(0, [0.0, 0.2, 0.0], margin=0.25)
    result.add(1, [0.0, 0.3], margin=0.25)
    assert (result.tokens, result.near_ties, result.worst) == (5, 1, 0.2)
    assert result.mismatches == [(1, 1, 0.3)]
    assert "1 mismatches" in result.summary() and result.furthest == 0.3
    assert result.describe(2)["mismatches"] == [(1, 1, 0.3)]


def test_rounding_is_no_mismatch():
    """Two steps of 1/8, as float32 subtracts them, are a tie; three are none."""
    result = Rescored()
    result.add(0, [0.25000011920928955, 0.375], margin=0.25)
    assert (result.near_ties, result.mismatches) == (1, [(0, 1, 0.375)])
