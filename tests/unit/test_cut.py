"""Into how many steps a round is cut."""

from __future__ import annotations

import itertools

import pytest

from sglang_vericache.rounds.cut import MOST_PARTS, Cut, cut_ahead, cut_evenly


@pytest.mark.parametrize(
    ("horizon", "verify_ms", "draft_ms", "cut"),
    [
        # 8B with 12 requests of 32K: 28.4 ms, then 27, 27 and 21.6.
        pytest.param(15, 23, 5.4, Cut(4, 5, 1), id="long-verification"),
        pytest.param(7, 23, 5.4, Cut(3, 3, 1), id="evenly"),
        pytest.param(15, 5, 1, Cut(1, 15, 15), id="fits"),
        pytest.param(15, 16, 1, Cut(2, 1, 14), id="does-not-quite"),
        pytest.param(15, 100, 5, Cut(4, 5, 1), id="verification-beyond-the-limit"),
        # 15 drafts of 10 ms: three steps of three, and the rest cannot be shorter.
        pytest.param(15, 2, 10, Cut(4, 4, 3), id="drafts-beyond-the-limit"),
        pytest.param(15, 50, 40, Cut(4, 5, 2), id="all-beyond-the-limit"),
        pytest.param(1, 29, 5, Cut(1, 1, 1), id="one-draft"),
        pytest.param(2, 29, 5, Cut(2, 1, 1), id="two-drafts"),
    ],
)
def test_ahead(horizon, verify_ms, draft_ms, cut):
    """Catches a step that verifies and drafts as much behind that as the others do."""
    assert cut_ahead(horizon, verify_ms, draft_ms, 30) == cut


@pytest.mark.parametrize("horizon", [1, 2, 7, 15, 31])
def test_ahead_always(horizon):
    """Catches tokens that no step drafts, a step of none, too many steps, and a step beyond the
    limit where another cut has none."""
    for verify, draft in itertools.product((0.5, 8, 23, 29, 70), (0.3, 1, 5.4, 12, 40)):
        cut = cut_ahead(horizon, verify, draft, 30)
        others = cut.steps - 1
        assert 1 <= cut.steps <= MOST_PARTS and 1 <= cut.behind <= horizon and cut.share >= 1
        if not others:
            assert cut == Cut(1, horizon, horizon)
            continue
        left = horizon - cut.behind
        assert (others - 1) * cut.share < left <= others * cut.share

        def longest(behind: int, others: int, verify=verify, draft=draft) -> float:
            share = -(-(horizon - behind) // others)
            return max(verify + behind * draft, share * draft)

        best = min(
            longest(behind, count) for behind in range(1, horizon) for count in range(1, MOST_PARTS)
        )
        # With too many for the limit, one token more than the best.
        assert longest(cut.behind, others) <= max(30, best + draft, verify + draft)


def test_evenly():
    """What holds where the parts are not known, and without drafting ahead."""
    assert cut_evenly(15, 0.045, 0.03) == Cut(2, 8, 8)
    assert cut_evenly(15, 9.0, 0.03) == Cut(4, 4, 4)
    assert cut_evenly(2, 9.0, 0.03) == Cut(2, 1, 1)
    assert cut_evenly(15, 0.045, float("inf")) == Cut(1, 15, 15)
