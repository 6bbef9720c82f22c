"""PendingTokens: what SGLang's batch does to it between two steps."""

from __future__ import annotations

import cpu_engine
import pytest
import torch

cpu_engine.required()

from sglang_vericache.draft_input import PendingTokens  # noqa: E402


def pending(tokens: list[int], futures: list[int] | None = None) -> PendingTokens:
    made = PendingTokens(torch.tensor(tokens))
    made.future_indices = torch.tensor(futures) if futures is not None else None
    return made


@pytest.mark.parametrize("futures", [None, [5, 6, 7]], ids=["plain", "overlap"])
def test_filter_keeps_the_order_given(futures):
    """Catches tokens that go to another request after one has finished, and a relay index that
    keeps its old length."""
    tokens = pending([10, 20, 30], futures)
    tokens.filter_batch(torch.tensor([2, 0]), [2, 0])
    assert tokens.bonus_tokens.tolist() == [30, 10]
    if futures is None:
        assert tokens.future_indices is None
    else:
        assert tokens.future_indices.tolist() == [7, 5]


@pytest.mark.parametrize("futures", [False, True], ids=["plain", "overlap"])
def test_merge_appends(futures):
    """Catches new requests that take the place of running ones."""
    tokens = pending([10, 20], [1, 2] if futures else None)
    tokens.merge_batch(pending([30], [3] if futures else None))
    assert tokens.bonus_tokens.tolist() == [10, 20, 30]
    if futures:
        assert tokens.future_indices.tolist() == [1, 2, 3]
