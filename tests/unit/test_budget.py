"""The budget of a path: shares add up, and nothing ever exceeds the limit."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from sglang_vericache.compressors.budget import ALWAYS_KEPT_TOKENS, Budget
from sglang_vericache.config import RECENT_TOKENS, SINK_TOKENS, VeriCacheConfig

RATIOS = ("0.001", "0.05", "0.07", "0.1", "0.2", "0.333", "0.5", "0.9", "1")
BUDGETS = [pytest.param(Budget(float(ratio), None), id=f"ratio-{ratio}") for ratio in RATIOS]
BUDGETS += [pytest.param(Budget(None, n), id=f"tokens-{n}") for n in (1, 30, 68, 500, 100_000)]
FLOORS = [(0.2, 1024), (0.2, 10), (0.5, 300), (1.0, 1024), (0.001, 100_000)]
BUDGETS += [
    pytest.param(Budget(ratio, None, least_rows=least), id=f"ratio-{ratio}-floor-{least}")
    for ratio, least in FLOORS
]
LENGTHS = (1, 2, 3, 4, 63, 64, 67, 68, 69, 100, 511, 512, 1000, 4097, 131_072)


def test_comes_from_the_config():
    """Catches a ratio, or a least number, that stays in force beside the tokens."""
    config = VeriCacheConfig(keep_ratio=0.3, keep_min_tokens=0)
    assert Budget.of(config).asked_rows(100) == 30
    assert Budget.of(VeriCacheConfig(keep_ratio=None, keep_tokens=7)).asked_rows(100) == 7
    assert Budget.of(VeriCacheConfig()).asked_rows(2000) == 1024


@pytest.mark.parametrize(
    ("budget", "tokens", "asked", "path", "limit"),
    [
        (Budget(0.2, None), 1000, 200, 200, 268),
        (Budget(0.2, None), 1001, 201, 201, 269),
        (Budget(0.2, None), 100, 20, 68, 88),
        (Budget(0.2, None), 50, 10, 50, 50),
        (Budget(1.0, None), 1000, 1000, 1000, 1000),
        (Budget(None, 300), 1000, 300, 300, 368),
        (Budget(None, 300), 200, 200, 200, 200),
        (Budget(None, 5), 1000, 5, 68, 73),
        (Budget(0.2, None, least_rows=300), 200, 200, 200, 200),
        (Budget(0.2, None, least_rows=300), 1000, 300, 300, 368),
        (Budget(0.2, None, least_rows=300), 2000, 400, 400, 468),
        (Budget(0.2, None, least_rows=300).without_floor, 1000, 200, 200, 268),
    ],
)
def test_by_hand(budget, tokens, asked, path, limit):
    """Catches a sink or recent token that is counted twice or not at all."""
    assert (SINK_TOKENS, RECENT_TOKENS, ALWAYS_KEPT_TOKENS) == (4, 64, 68)
    assert budget.asked_rows(tokens) == asked
    assert budget.path_rows(tokens) == path
    assert budget.limit_rows(tokens) == limit


@pytest.mark.parametrize("ratio", RATIOS)
def test_ratio_is_taken_as_written(ratio):
    """Catches the dust of binary fractions: 0.07 of 100 tokens is 7, not 8."""
    wrong = {
        tokens: Budget(float(ratio), None).asked_rows(tokens)
        for tokens in range(1, 2000)
        if Budget(float(ratio), None).asked_rows(tokens) != math.ceil(Fraction(ratio) * tokens)
    }
    assert not wrong


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_fit_the_path_and_the_limit(budget, tokens):
    """Catches a selection that asks for more tokens than there are, or more than rows are wide."""
    assert 1 <= budget.asked_rows(tokens) <= tokens
    assert budget.asked_rows(tokens) <= budget.path_rows(tokens) <= budget.limit_rows(tokens)
    assert min(tokens, ALWAYS_KEPT_TOKENS) <= budget.path_rows(tokens)
    assert budget.limit_rows(tokens) <= tokens


@pytest.mark.parametrize("budget", BUDGETS)
def test_limit_grows_with_the_path(budget):
    """Catches draft rows sized for the longest context that a shorter one overflows."""
    for rows in (budget.limit_rows, budget.asked_rows, budget.path_rows):
        found = [rows(tokens) for tokens in (*LENGTHS[:-1], *range(4098, 9000, 7), LENGTHS[-1])]
        assert found == sorted(found)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("opened", [1, 70, 500, 1000, 5000])
def test_folds_stay_within_their_limit(budget, opened):
    """Catches folds that fill a row, or let a view fall below what it was opened with."""
    rng, end, rows, anew = random.Random(3), opened, budget.path_rows(opened), 0
    for _ in range(60):
        tokens = rng.randint(1, 300)
        end += tokens
        folded = budget.folded_rows(tokens, end, rows)
        assert 0 <= folded <= tokens
        if rows + folded > budget.folded_limit_rows(end):
            rows, anew = budget.path_rows(end), anew + 1
        else:
            rows += folded
        assert rows >= min(end, budget.asked_rows(end)) - 60
    if budget.least_rows:
        assert rows >= min(end, budget.least_rows)
        assert not anew, "short contexts would be selected anew with every fold"


@pytest.mark.parametrize("budget", BUDGETS)
def test_limits_of_folds_grow_with_the_path(budget):
    found = [budget.folded_limit_rows(tokens) for tokens in (*LENGTHS, *range(131_073, 140_000, 7))]
    assert found == sorted(found)
    pairs = [(budget.limit_rows(tokens), budget.folded_limit_rows(tokens)) for tokens in LENGTHS]
    assert all(limit <= folded <= n for (limit, folded), n in zip(pairs, LENGTHS, strict=True))


def test_what_is_kept_of_a_tail():
    floor = Budget(0.2, None, least_rows=1024)
    assert floor.folded_rows(224, 1248, before=1024) == 45
    assert floor.folded_rows(224, 724, before=500) == 224, "all, up to the least number"
    assert floor.folded_rows(224, 1100, before=900) == 124
    assert floor.folded_rows(224, 10_000, before=1955) == 45
    assert Budget(0.2, None, most_rows=500, least_rows=0).folded_rows(200, 10_000, 480) == 10
    assert Budget(None, 300).folded_rows(100, 1000, before=270) == 30


@pytest.mark.parametrize(("ratio", "least"), FLOORS)
def test_a_floor_is_the_larger_of_two_budgets(ratio, least):
    """Catches a floor that adds to the share, or that a growing path leaves behind too late."""
    floor = Budget(ratio, None, least_rows=least)
    share, tokens = Budget(ratio, None), Budget(None, least)
    for end in range(1, 12_000, 53):
        for name in ("asked_rows", "path_rows", "limit_rows"):
            rows = [getattr(budget, name)(end) for budget in (floor, share, tokens)]
            assert rows[0] == max(rows[1:])
        assert floor.keeps_at_least(share, end) and floor.keeps_at_least(tokens, end)


def test_a_request_keeps_no_more_than_its_row_holds_whatever_the_floor():
    assert Budget(0.2, None, most_rows=50, least_rows=300).asked_rows(1000) == 50


@pytest.mark.parametrize("ratio", RATIOS)
def test_shares_of_a_ratio_add_up(ratio):
    """Catches shares that lose rows at the seams, or grow with the number of parts by more than
    rounding up costs: one row for the part and one for the path that it ends."""
    budget, rng = Budget(float(ratio), None), random.Random(1)
    for end in LENGTHS[1:]:
        cuts = sorted(rng.sample(range(1, end), min(end - 1, rng.randint(1, 6))))
        bounds = list(zip([0, *cuts], [*cuts, end], strict=True))
        shares = [budget.share_rows(stop - start, end) for start, stop in bounds]
        asked = budget.asked_rows(end)
        assert asked <= sum(shares) < asked + 2 * len(bounds)


@pytest.mark.parametrize("budget", BUDGETS)
def test_share_is_proportional(budget):
    """Catches a share of the wrong whole: [start, end) gets its part of what [0, end) asks for."""
    rng = random.Random(2)
    for end in LENGTHS[1:]:
        start = rng.randrange(end)
        share = Fraction(budget.asked_rows(end) * (end - start), end)
        assert budget.share_rows(end - start, end) == math.ceil(share) <= end - start


@pytest.mark.parametrize("budget", BUDGETS)
def test_share_of_everything_is_what_is_asked(budget):
    """Catches a whole path that is treated unlike the sum of its parts."""
    for end in LENGTHS:
        assert budget.share_rows(end, end) == budget.asked_rows(end)


def test_a_request_keeps_no_more_than_its_row_holds():
    """Catches a large ratio of a long path that does not fit into a draft row."""
    budget = Budget(0.5, None, most_rows=300)
    assert [budget.asked_rows(tokens) for tokens in (100, 600, 601, 5000)] == [50, 300, 300, 300]
    assert budget.limit_rows(5000) == 300 + ALWAYS_KEPT_TOKENS


@pytest.mark.parametrize(
    ("kept", "asked", "tokens", "enough"),
    [
        (Budget(0.2, None), Budget(0.2, None), 1000, True),
        (Budget(0.2, None), Budget(0.3, None), 1000, False),
        (Budget(None, 200), Budget(0.2, None), 1000, True),
        (Budget(None, 200), Budget(0.2, None), 1001, False),
        (Budget(0.2, None), Budget(None, 200), 999, True),
        (Budget(0.2, None), Budget(None, 200), 990, False),
        (Budget(0.2, None, least_rows=500), Budget(0.5, None), 1000, True),
        (Budget(0.2, None, least_rows=500), Budget(0.5, None), 1001, False),
        (Budget(0.2, None), Budget(0.2, None, least_rows=500), 1000, False),
        (Budget(0.2, None), Budget(0.2, None, least_rows=500), 2500, True),
    ],
)
def test_keeps_at_least(kept, asked, tokens, enough):
    """Catches budgets compared by their settings instead of by what they keep of this path."""
    assert kept.keeps_at_least(asked, tokens) == enough
