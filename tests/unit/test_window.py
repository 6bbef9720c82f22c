"""QueryWindow: joining the queries of successive prefills."""

from __future__ import annotations

import pytest
import torch
from score_fakes import make_rotary

from sglang_vericache.compressors.query_stats import StatsWatch
from sglang_vericache.compressors.watch import PassRows
from sglang_vericache.compressors.window import QueryWindow, WindowWatch


def window(start: int, end: int, limit: int = 64) -> QueryWindow:
    """Queries [start, end), each filled with its own position."""
    positions = torch.arange(start, end)
    queries = positions.float()[None, :, None, None].expand(2, -1, 3, 4)
    return QueryWindow(queries, tuple(range(start, end)), limit)


def content(joined: QueryWindow) -> list[int]:
    """Positions, after checking that every query still stands beside its own."""
    positions = joined.device_positions
    assert torch.equal(joined.queries, positions.float()[None, :, None, None].expand(2, -1, 3, 4))
    return positions.tolist()


@pytest.mark.parametrize(
    ("first", "second", "limit", "kept"),
    [
        pytest.param((0, 4), (4, 7), 64, [0, 1, 2, 3, 4, 5, 6], id="all"),
        pytest.param((0, 4), (4, 7), 5, [2, 3, 4, 5, 6], id="cut"),
        pytest.param((0, 4), (9, 12), 5, [2, 3, 9, 10, 11], id="gap"),
        pytest.param((0, 4), (4, 12), 3, [9, 10, 11], id="only-the-later"),
    ],
)
def test_keeps_the_last_of_both(first, second, limit, kept):
    """Catches queries cut at the wrong end, or positions cut unlike their queries."""
    joined = window(*first, limit).then(window(*second, limit))
    assert content(joined) == kept
    assert joined.count == len(kept)
    assert joined.end == second[1]


@pytest.mark.parametrize("limit", [64, 5, 2], ids=["all", "cut", "only-the-later"])
def test_start_is_the_first_position(limit):
    """Catches a start that keeps its value when the first queries are cut off: whoever compares
    it with the end of another window takes the two for overlapping."""
    joined = window(0, 4, limit).then(window(4, 7, limit))
    assert joined.start == joined.positions[0]


def test_must_follow():
    """Catches the same queries counted twice."""
    with pytest.raises(ValueError, match=r"\[3, 6\) do not follow queries up to 4"):
        window(0, 4).then(window(3, 6))


def test_bytes():
    """Catches an element size that is left out."""
    assert window(0, 5).bytes == 2 * 5 * 3 * 4 * 4


@pytest.mark.parametrize("watch", [WindowWatch(3), StatsWatch()])
def test_several_requests_at_once_see_the_same(watch):
    """Catches rows of one request in another's part when a pass is looked at as a whole."""
    torch.manual_seed(0)
    queries, rotary = torch.randn(20, 4, 8), make_rotary(8, 200)
    rows = PassRows([7, 100, 0], [3, 5, 1], [2, 9, 19])
    layers = [queries, -queries]
    seen = watch.observations([watch.see_pass(layer, rows, rotary) for layer in layers], rows)
    assert len(seen) == 3
    for found, start, count, first in zip(
        seen, rows.starts, rows.counts, rows.offsets, strict=True
    ):
        parts = [watch.see(layer[first : first + count], start, rotary) for layer in layers]
        alone = watch.observation(parts, start, start + count)
        assert (found.start, found.end, found.count) == (start, start + count, count)
        for layer in range(2):
            torch.testing.assert_close(dict(found.inputs(layer)), dict(alone.inputs(layer)))


@pytest.mark.parametrize("requests", [1, 3])
def test_what_is_kept_of_a_pass(requests):
    """Catches an observation that keeps the queries of the whole pass alive, or those that the next
    layer writes over."""
    watch, queries = WindowWatch(4), torch.randn(requests * 4, 2, 8)
    rows = PassRows([0] * requests, [4] * requests, [4 * i for i in range(requests)])
    part = watch.see_pass(queries, rows, None)
    before = queries.clone()
    queries.zero_()
    seen = watch.observations([part, part], rows)
    for i, found in enumerate(seen):
        assert torch.equal(found.queries[0], before[4 * i : 4 * i + 4])
        assert found.queries.untyped_storage().nbytes() == found.bytes
