"""Prefills after which no token is wanted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_vericache.plain.score_only import mark_scoring


def request(max_new_tokens: int, positions: list[int] | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        sampling_params=SimpleNamespace(max_new_tokens=max_new_tokens),
        token_indices_to_pool=positions,
        to_finish=None,
    )


@pytest.mark.parametrize(
    ("counts", "expected"), [([0], True), ([0, 0], True), ([1], False), ([0, 5], False)]
)
def test_only_where_nobody_wants_a_token(counts, expected):
    """Catches a token that is not sampled for the one who asked beside a score, and one that is
    for those who did not."""
    batch = SimpleNamespace(reqs=[request(n) for n in counts], is_prefill_only=not expected)
    mark_scoring(batch)
    assert batch.is_prefill_only is expected
    assert all(req.to_finish is None for req in batch.reqs)


def test_scores_at_positions_are_refused():
    """Catches scores of all positions in place of those asked for."""
    batch = SimpleNamespace(reqs=[request(0, [3, 9])], is_prefill_only=True)
    mark_scoring(batch)
    assert batch.is_prefill_only is False
    refusal = batch.reqs[0].to_finish.to_json()
    assert refusal["status_code"] == 400
    assert "score_extraction_token is not accepted" in refusal["message"]
