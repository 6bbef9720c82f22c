"""select_rows: what must be kept is kept, then the best, in the order of the path."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache.compressors.select import select_rows

NAN, INF = float("nan"), float("inf")
SINKS, RECENT = 4, 64


def expected(scores: list[float], rows: int, start: int, path_end: int, keep_recent: bool) -> set:
    """The kept indices of one head: forced ones first, then by descending score."""

    def rank(index: int):
        position = start + index
        forced = position < SINKS or (keep_recent and position >= path_end - RECENT)
        return (not forced, -scores[index])

    return set(sorted(range(len(scores)), key=rank)[:rows])


@pytest.mark.parametrize("keep_recent", [True, False], ids=["recent", "no-recent"])
@pytest.mark.parametrize(
    ("tokens", "rows", "start", "path_end"),
    [
        pytest.param(300, 100, 0, 300, id="whole-path"),
        pytest.param(300, 68, 0, 300, id="only-the-forced"),
        pytest.param(300, 300, 0, 300, id="everything"),
        pytest.param(300, 80, 2, 302, id="starts-in-the-sinks"),
        pytest.param(200, 50, 1000, 2000, id="middle"),
        pytest.param(200, 70, 1000, 1240, id="ends-in-the-recent"),
        pytest.param(50, 50, 1000, 1050, id="all-recent"),
        pytest.param(3, 3, 0, 3, id="shorter-than-the-sinks"),
        pytest.param(100, 1, 500, 5000, id="one-row"),
    ],
)
def test_keeps_the_forced_and_the_best(tokens, rows, start, path_end, keep_recent):
    """Catches sinks counted from the interval instead of the path, a recent window that is one
    off or left in when not wanted, worse tokens taken for better, and heads that are mixed up."""
    scores = torch.rand(3, tokens)
    picks = select_rows(scores, rows, start, path_end, keep_recent)
    assert picks.shape == (3, rows)
    assert picks.dtype == torch.int64
    for head in range(3):
        kept = picks[head].tolist()
        assert kept == sorted(set(kept)), "ascending, none twice"
        assert set(kept) == expected(scores[head].tolist(), rows, start, path_end, keep_recent)


@pytest.mark.parametrize("score", [0.0, -INF, INF, NAN], ids=str)
def test_ties_still_give_the_rows_asked_for(score):
    """Catches a token picked twice, or fewer rows, where every score is the same."""
    picks = select_rows(torch.full((2, 200), score), 90, 0, 200)
    for head in picks.tolist():
        assert head == sorted(set(head)) and len(head) == 90
        assert set(head) >= {0, 1, 2, 3, *range(136, 200)}


def test_not_a_number_comes_last():
    """Catches topk's own order, in which not-a-number beats every score."""
    scores = torch.full((1, 100), NAN)
    scores[0, 40:60] = -3e38
    assert select_rows(scores, 20, 1000, 9000).tolist() == [list(range(40, 60))]


def test_minus_infinity_beats_not_a_number():
    """Catches the two being merged: a masked token is at least a token that was rated."""
    scores = torch.full((1, 50), NAN)
    scores[0, 7:9] = -INF
    assert select_rows(scores, 2, 1000, 9000).tolist() == [[7, 8]]


def test_infinite_score_does_not_push_out_the_forced():
    """Catches scores that overflow and tie with the sinks and recent tokens."""
    scores = torch.zeros(1, 200)
    scores[0, 50:150] = INF
    picks = select_rows(scores, 68, 0, 200)
    assert picks.tolist() == [[0, 1, 2, 3, *range(136, 200)]]


def test_forced_tokens_need_no_number():
    """Catches not-a-number at a sink or recent token that makes it drop out."""
    scores = torch.rand(1, 200)
    scores[0, 0] = scores[0, 199] = NAN
    assert {0, 199} <= set(select_rows(scores, 70, 0, 200)[0].tolist())


def test_half_precision_scores():
    """Catches a clamp to float32's largest number that overflows in the scores' own type."""
    scores = torch.zeros(1, 20, dtype=torch.float16)
    scores[0, 11] = 1
    assert select_rows(scores, 1, 500, 5000).tolist() == [[11]]


def test_scores_are_not_changed():
    """Catches masking in place: the caller's scores may be kept for the next selection."""
    scores = torch.rand(2, 100)
    before = scores.clone()
    select_rows(scores, 80, 0, 100)
    assert torch.equal(scores, before)


def test_more_rows_than_tokens():
    """Catches a budget that outgrows its interval, with both numbers in the message."""
    with pytest.raises(ValueError, match="rows=11 exceeds the 10 tokens"):
        select_rows(torch.zeros(2, 10), 11, 0, 10)
