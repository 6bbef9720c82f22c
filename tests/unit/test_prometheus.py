"""The exporter against prometheus_client's own registry."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from sglang_vericache.metrics import DraftCounters, Numbers, RowBytes, SpanCounters
from sglang_vericache.phase_clock import PHASES
from sglang_vericache.prometheus import METRICS, PREFIX, PrometheusExporter

LABELS = {"model_name": "m", "tp_rank": 0}


def numbers(factor: int = 1) -> Numbers:
    return Numbers(
        drafting=True,
        total=DraftCounters(
            rounds=3 * factor,
            drafted=24 * factor,
            accepted=10 * factor,
            yields=defaultdict(int, {1: factor, 6: 2 * factor}),
            plain=defaultdict(int, {"grammar": 4 * factor}),
            draft_rows_read=100 * factor,
            full_rows_read=50 * factor,
            rows_full=500 * factor,
        ),
        row_bytes=RowBytes(2, 8),
        spans=SpanCounters(built=2 * factor, reused=5 * factor, dropped=factor),
        pool_used_tokens=70,
        pool_tokens=100,
        phase_seconds=dict.fromkeys(PHASES, 0.5 * factor),
        rounds_ahead=2 * factor,
        shared_tokens=9 * factor,
    )


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def exporter(registry):
    return PrometheusExporter(LABELS, horizon=8, registry=registry)


def value(registry, name: str, **labels: str) -> float | None:
    labels = {key: str(text) for key, text in LABELS.items()} | labels
    return registry.get_sample_value(PREFIX + name, labels)


def test_names():
    """Catches a counter without its unit or suffix, and a name that is declared twice."""
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"sglang:vericache_[a-z_]+", metric.full_name)
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert metric.help.endswith(".")


def test_values(registry, exporter):
    """Catches a metric that reads another's number."""
    exporter.export(numbers())
    assert value(registry, "rounds_total") == 3
    assert value(registry, "drafted_tokens_total") == 24
    assert value(registry, "accepted_tokens_total") == 10
    assert value(registry, "plain_tokens_total", reason="grammar") == 4
    assert value(registry, "kv_read_bytes_total", cache="draft") == 200
    assert value(registry, "kv_read_bytes_total", cache="full") == 400
    assert value(registry, "kv_plain_bytes_total") == 4000
    assert value(registry, "kv_shared_bytes_total") == 72
    assert value(registry, "rounds_ahead_total") == 2
    assert value(registry, "spans_built_total") == 2
    assert value(registry, "spans_reused_total") == 5
    assert value(registry, "spans_dropped_total") == 1
    assert value(registry, "draft_pool_used_tokens") == 70
    assert value(registry, "draft_pool_tokens") == 100
    assert value(registry, "drafting") == 1
    for phase in PHASES:
        assert value(registry, "phase_seconds_total", phase=phase) == 0.5


def test_histogram(registry, exporter):
    """Catches rounds in the wrong bucket, and a sum that disagrees with the counters."""
    exporter.export(numbers())
    assert value(registry, "tokens_per_round_sum") == 13
    assert value(registry, "tokens_per_round_count") == 3
    buckets = {le: value(registry, "tokens_per_round_bucket", le=le) for le in ("1.0", "5.0")}
    assert buckets == {"1.0": 1, "5.0": 1}
    assert value(registry, "tokens_per_round_bucket", le="6.0") == 3
    assert value(registry, "tokens_per_round_bucket", le="8.0") == 3
    assert value(registry, "tokens_per_round_bucket", le="10.0") is None, "beyond the horizon"


def test_only_news_are_added(registry, exporter):
    """Catches totals that are added again at each export."""
    for factor in (1, 1, 3):
        exporter.export(numbers(factor))
    assert value(registry, "rounds_total") == 9
    assert value(registry, "plain_tokens_total", reason="grammar") == 12
    assert value(registry, "tokens_per_round_sum") == 39
    assert value(registry, "phase_seconds_total", phase="draft") == 1.5


def test_gauges_follow(registry, exporter):
    """Catches a gauge that only rises."""
    exporter.export(numbers())
    exporter.export(replace(numbers(), drafting=False, pool_used_tokens=0))
    assert value(registry, "drafting") == 0
    assert value(registry, "draft_pool_used_tokens") == 0


def test_a_counter_that_falls_waits(registry, exporter):
    """Catches an exception in the scheduler: tokens past the end of an output are taken back."""
    exporter.export(numbers(2))
    exporter.export(numbers(1))
    assert value(registry, "accepted_tokens_total") == 20
    exporter.export(numbers(3))
    assert value(registry, "accepted_tokens_total") == 30


def test_everything_is_there_from_the_start(registry, exporter):
    """Catches series that appear with their first event: a rate over it would miss that."""
    nothing = numbers(0)
    nothing.total.plain.clear()
    nothing.total.yields.clear()
    exporter.export(nothing)
    found = {sample.name for family in registry.collect() for sample in family.samples}
    for metric in METRICS:
        name = metric.full_name + ("_count" if metric.kind == "histogram" else "")
        assert name in found or metric.label == "reason", name
