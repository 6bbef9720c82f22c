"""Counters: sums, derived numbers and what the response field shows."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import fields
from types import SimpleNamespace

from sglang_vericache.metrics import DraftCounters, RowBytes, SpanCounters, counters_of

# A draft pool that stores a quarter of what the full one does.
ROW_BYTES = RowBytes(draft=10, full=40)


def tally(**counts: int) -> defaultdict:
    return defaultdict(int, counts)


def sample(factor: int = 1) -> DraftCounters:
    return DraftCounters(
        rounds=2 * factor,
        drafted=20 * factor,
        accepted=13 * factor,
        yields=defaultdict(int, {7: factor, 8: factor}),
        plain=tally(short_context=3 * factor, grammar=1 * factor),
        draft_rows_read=70 * factor,
        full_rows_read=30 * factor,
        rows_full=900 * factor,
        draft_rows_limit_exceeded=5 * factor,
    )


def test_counting_starts_at_zero():
    """Catches a counter that reports one event too many for ever."""
    assert set(vars(SpanCounters()).values()) == {0}
    counters = vars(DraftCounters())
    assert counters.pop("plain") == counters.pop("yields") == {}
    assert set(counters.values()) == {0}


def test_tokens():
    """Catches the full model's own token of each round left out: 13 accepted + 2 + 4 plain."""
    assert sample().round_tokens == 15
    assert sample().tokens == 19


def test_add_sums_every_field():
    """Catches a new counter that `add` forgets; the other side must stay as it is."""
    total, other = sample(2), sample(1)
    total.add(other)
    for field in fields(DraftCounters):
        assert getattr(total, field.name) == getattr(sample(3), field.name), field.name
        assert getattr(other, field.name) == getattr(sample(1), field.name), field.name


def test_add_keeps_reasons_apart():
    """Catches a counter of reasons that is shared or replaced instead of summed."""
    total = DraftCounters(plain=tally(sampling=1))
    total.add(sample())
    total.add(sample())
    assert total.plain == {"sampling": 1, "short_context": 6, "grammar": 2}


def test_describe():
    """Catches values that JSON does not know, and a division by zero before the first round."""
    shown = json.loads(json.dumps(sample().describe(ROW_BYTES)))
    assert shown["tokens_per_round"] == 7.5
    assert shown["plain"] == {"short_context": 3, "grammar": 1}
    assert (shown["rounds"], shown["drafted"], shown["accepted"]) == (2, 20, 13)
    assert (shown["draft_rows_read"], shown["full_rows_read"]) == (70, 30)
    assert (shown["rows_read"], shown["rows_full"]) == (100, 900)
    assert DraftCounters().describe(ROW_BYTES)["tokens_per_round"] is None


def test_describe_is_a_snapshot():
    """Catches a finished request's response that changes with later counting."""
    counters = sample()
    shown = counters.describe(ROW_BYTES)
    counters.plain["grammar"] += 10
    assert shown["plain"]["grammar"] == 1


def test_counters_live_with_the_request():
    """Catches counters lost on retraction, and counters shared between requests."""
    first, second = SimpleNamespace(), SimpleNamespace()
    counters_of(first).rounds += 1
    counters_of(first).plain["grammar"] += 1
    assert counters_of(first).rounds == 1
    assert (counters_of(second).rounds, counters_of(second).plain) == (0, {})


def test_parse_is_the_inverse_of_describe():
    """Catches a counter that gets lost between the server and whoever reads the response."""
    counters = DraftCounters(rounds=3, drafted=40, accepted=21, rows_full=2000)
    counters.draft_rows_read, counters.full_rows_read = 600, 300
    counters.plain["penalty"] += 4
    assert DraftCounters.parse(counters.describe(ROW_BYTES)) == counters
    assert DraftCounters.parse({}) == DraftCounters()


def test_bytes_count_each_row_at_its_own_size():
    """Catches rows of a quantised draft pool that are charged at the full size."""
    shown = sample().describe(ROW_BYTES)
    assert shown["bytes_read"] == 70 * 10 + 30 * 40
    assert shown["bytes_full"] == 900 * 40


def test_cut_takes_back_what_was_past_the_end():
    """Catches tokens behind a stop that are counted as drafted well."""
    counters = DraftCounters(rounds=2, drafted=16, accepted=9, rows_full=1000)
    counters.yields.update({5: 1, 6: 1})
    counters.cut(4, 300, round_tokens=6, reason=None)
    assert (counters.accepted, counters.rows_full, counters.round_tokens) == (5, 700, 7)
    assert sum(tokens * rounds for tokens, rounds in counters.yields.items()) == 7
    assert counters.accepted_histogram() == [0, 1, 0, 0, 1]


def test_accepted_histogram():
    """Catches an index that counts the full model's own token."""
    assert DraftCounters().accepted_histogram() == []
    assert sample().accepted_histogram() == [0, 0, 0, 0, 0, 0, 1, 1]
    nothing = DraftCounters(yields=defaultdict(int, {1: 3}))
    assert nothing.accepted_histogram() == [3]
