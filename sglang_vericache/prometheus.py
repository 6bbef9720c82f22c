"""The metrics ``sglang:vericache_*`` of a server with ``--enable-metrics``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sglang_vericache.metrics import Numbers

PREFIX = "sglang:vericache_"
# Upper bounds of tokens a round, as far as the horizon reaches.
_ROUND_BOUNDS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 28, 33, 40, 48, 65, 96, 129)


@dataclass(frozen=True)
class Metric:
    """
    Attributes:
        name: without the prefix; a counter's ends in ``_total``.
        read: its value; by label where it has one, rounds by tokens for the histogram.
        label: name of its own label.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    read: Callable[[Numbers], Any]
    label: str | None = None

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


METRICS = (
    Metric(
        "rounds_total",
        "counter",
        "Rounds: verify passes, counted for each request in them.",
        lambda n: n.total.rounds,
    ),
    Metric("drafted_tokens_total", "counter", "Draft tokens verified.", lambda n: n.total.drafted),
    Metric(
        "accepted_tokens_total",
        "counter",
        "Draft tokens found equal to the full model's.",
        lambda n: n.total.accepted,
    ),
    Metric(
        "tokens_per_round",
        "histogram",
        "Tokens that a round produced, the full model's own one included.",
        lambda n: n.total.yields,
    ),
    Metric(
        "plain_tokens_total",
        "counter",
        "Tokens decoded without drafting, by reason.",
        lambda n: n.total.plain,
        label="reason",
    ),
    Metric(
        "kv_read_bytes_total",
        "counter",
        "KV bytes that attention read while decoding, of the compressed (draft) and full cache.",
        lambda n: {
            "draft": n.total.draft_rows_read * n.row_bytes.draft,
            "full": n.total.full_rows_read * n.row_bytes.full,
        },
        label="cache",
    ),
    Metric(
        "kv_plain_bytes_total",
        "counter",
        "KV bytes that plain decoding would have read for the same tokens.",
        lambda n: n.total.bytes_full(n.row_bytes),
    ),
    Metric(
        "kv_shared_bytes_total",
        "counter",
        "Of the bytes of the full cache in kv_read_bytes_total, those that were read for another "
        "request at the same time (--vericache-cascade).",
        lambda n: n.shared_tokens * n.row_bytes.full,
    ),
    Metric(
        "rounds_ahead_total",
        "counter",
        "Scheduler steps that drafted the next round behind a verification "
        "(--vericache-draft-ahead).",
        lambda n: n.rounds_ahead,
    ),
    Metric(
        "spans_built_total",
        "counter",
        "Compressed spans selected from a prompt or a whole path.",
        lambda n: n.spans.built,
    ),
    Metric(
        "spans_folded_total",
        "counter",
        "Compressed spans selected from generated tokens.",
        lambda n: n.spans.folded,
    ),
    Metric(
        "spans_reused_total",
        "counter",
        "Compressed spans found on the radix tree and used again.",
        lambda n: n.spans.reused,
    ),
    Metric(
        "spans_dropped_total",
        "counter",
        "Compressed spans that left the radix tree, evicted ones included.",
        lambda n: n.spans.dropped,
    ),
    Metric(
        "spans_evicted_total",
        "counter",
        "Compressed spans that made room for others in the draft pool.",
        lambda n: n.spans.evicted,
    ),
    Metric(
        "views_refused_total",
        "counter",
        "Draft views refused because the draft pool was full.",
        lambda n: n.spans.no_memory,
    ),
    Metric(
        "views_grown_total",
        "counter",
        "Draft views replaced by larger ones because drafts over them failed.",
        lambda n: n.spans.views_grown,
    ),
    Metric(
        "draft_pool_used_tokens",
        "gauge",
        "Token slots of the draft pool in use.",
        lambda n: n.pool_used_tokens,
    ),
    Metric("draft_pool_tokens", "gauge", "Token slots of the draft pool.", lambda n: n.pool_tokens),
    Metric(
        "phase_seconds_total",
        "counter",
        "Seconds by phase of the scheduler step (the device's on a GPU, the host's elsewhere).",
        lambda n: n.phase_seconds,
        label="phase",
    ),
    Metric(
        "offload_active",
        "gauge",
        "1 while the full KV of running requests may leave the GPU (--vericache-offload, enough "
        "host memory, a living loader thread).",
        lambda n: int(n.offload.active),
    ),
    Metric(
        "offload_attached_requests",
        "gauge",
        "Running requests whose full KV is locked on the GPU.",
        lambda n: n.offload.attached,
    ),
    Metric(
        "offload_detached_requests",
        "gauge",
        "Running requests whose full KV may leave the GPU, or is on its way back.",
        lambda n: n.offload.detached + n.offload.fetching,
    ),
    Metric(
        "offload_waiting_verifies",
        "gauge",
        "Requests that have drafted all they may and wait for their full KV.",
        lambda n: n.offload.waiting,
    ),
    Metric(
        "offload_moves_total",
        "counter",
        "Times that the full KV of a running request was released, or was there again.",
        lambda n: {"detach": n.offload.detachments, "attach": n.offload.attachments},
        label="move",
    ),
    Metric(
        "offload_fetches_total",
        "counter",
        "Fetches of full KV by their end: arrived (all that did), failed (copied a second time), "
        "late (copied by the scheduler instead of the loader), cancelled.",
        lambda n: {
            "arrived": n.offload.fetches,
            "failed": n.offload.failed,
            "late": n.offload.late,
            "cancelled": n.offload.cancelled,
        },
        label="end",
    ),
    Metric(
        "offload_fetched_bytes_total",
        "counter",
        "Bytes of full KV that were fetched from the host.",
        lambda n: n.offload.fetched_bytes,
    ),
    Metric(
        "offload_fetch_seconds_total",
        "counter",
        "Seconds in which full KV was being copied from the host: its rate is the link's use.",
        lambda n: n.offload.fetch_seconds,
    ),
    Metric(
        "offload_corrupt_fetches_total",
        "counter",
        "Fetches that brought something else than what had been written to the host "
        "(--vericache-offload-checksums); it is not used.",
        lambda n: n.offload.corrupt,
    ),
    Metric(
        "offload_recomputed_tokens_total",
        "counter",
        "Tokens whose KV was computed again because their copy on the host was corrupt.",
        lambda n: n.offload.recomputed_tokens,
    ),
    Metric(
        "offload_prompts_total",
        "counter",
        "Prompts brought from the host before their prefill, while others decoded.",
        lambda n: n.offload.prompts,
    ),
    Metric("drafting", "gauge", "1 while drafting is switched on.", lambda n: int(n.drafting)),
)


class PrometheusExporter:
    """Declares the metrics and brings them up to date.

    prometheus_client is imported here because it looks at PROMETHEUS_MULTIPROC_DIR when it is.
    Counters add what came since the last export; in SGLang's multiprocess mode each process
    writes its share to a file, and the server's endpoint sums them.

    Args:
        labels: of every sample, as SGLang's own scheduler metrics have them.
        horizon: most tokens drafted in a round.
        registry: where to register, prometheus_client's own by default.
    """

    def __init__(self, labels: Mapping[str, Any], horizon: int, registry: Any = None) -> None:
        import prometheus_client

        self._labels = dict(labels)
        common = {} if registry is None else {"registry": registry}
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "counter": (prometheus_client.Counter, {}),
            "gauge": (prometheus_client.Gauge, {"multiprocess_mode": "mostrecent"}),
            "histogram": (prometheus_client.Histogram, {"buckets": _round_bounds(horizon)}),
        }
        self._families = {}
        for metric in METRICS:
            kind, options = kinds[metric.kind]
            names = [*self._labels, *([metric.label] if metric.label else [])]
            self._families[metric] = kind(metric.full_name, metric.help, names, **options, **common)
        self._children: dict[tuple[Metric, str], Any] = {}
        self._exported: dict[Metric, dict[Any, float]] = defaultdict(dict)

    def export(self, numbers: Numbers) -> None:
        for metric in METRICS:
            value = metric.read(numbers)
            if metric.kind == "gauge":
                self._child(metric, "").set(value)
            elif metric.kind == "histogram":
                child = self._child(metric, "")
                for tokens, rounds in self._news(metric, value):
                    _observe(child, tokens, rounds)
            else:
                for key, more in self._news(metric, value if metric.label else {"": value}):
                    self._child(metric, key).inc(more)

    def _news(self, metric: Metric, values: Mapping[Any, float]) -> list[tuple[Any, float]]:
        """What came since the last export. A value that fell (a round's tokens past the end of
        an output are taken back) waits until it has risen again: counters only rise."""
        exported = self._exported[metric]
        news = [(key, now - exported.get(key, 0)) for key, now in values.items()]
        news = [(key, more) for key, more in news if more > 0 or key not in exported]
        for key, more in news:
            exported[key] = exported.get(key, 0) + more
        return news

    def _child(self, metric: Metric, key: str) -> Any:
        child = self._children.get((metric, key))
        if child is None:
            own = {metric.label: key} if metric.label else {}
            child = self._families[metric].labels(**self._labels, **own)
            self._children[metric, key] = child
        return child


def _round_bounds(horizon: int) -> list[int]:
    return [bound for bound in _ROUND_BOUNDS if bound <= horizon + 1]


def _observe(histogram: Any, value: int, times: float) -> None:
    """``observe(value)`` so many times at once, by the parts that it consists of, as SGLang does
    for its inter-token latency."""
    histogram._sum.inc(value * times)
    for bound, bucket in zip(histogram._upper_bounds, histogram._buckets, strict=True):
        if value <= bound:
            bucket.inc(times)
            return
