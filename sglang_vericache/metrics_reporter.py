"""SGLang's metrics reporter, counting rounds where it would count steps, and exporting ours."""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter

from sglang_vericache.flags import config_of
from sglang_vericache.metrics import DraftCounters, Numbers, OffloadNumbers, SpanCounters
from sglang_vericache.prometheus import PrometheusExporter

# Between requests only the pool and the spans change; SGLang's idle loop spins.
_IDLE_EXPORT_S = 1.0


class VeriCacheMetricsReporter(SchedulerMetricsReporter):
    """ "accept len" of the log, the ``spec_*`` gauges and the average of the info endpoint count
    rounds only: a step in which a request decodes plainly or waits for its turn to verify is no
    attempt that failed."""

    # Of the base class.
    spec_num_forward_ct: int
    spec_total_num_forward_ct: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exporter = None
        self._exported_at = 0.0
        if self.current_scheduler_metrics_enabled:
            config = config_of(self.scheduler.server_args)
            self.exporter = PrometheusExporter(self.metrics_collector.labels, config.deepest)
            self._export()

    def update_spec_metrics(self, bs: int, *args: Any, **kwargs: Any) -> None:
        step = self.scheduler.draft_worker.settled
        super().update_spec_metrics(
            step.rounds,
            num_correct_drafts=step.accepted,
            num_accept_tokens=step.round_tokens,
            # Its "cap length" is the width of the verify pass, which a short horizon narrows.
            num_cap_tokens=step.drafted + step.rounds,
        )

    def report_decode_stats(self, *args: Any, **kwargs: Any) -> None:
        rounds, total = self.spec_num_forward_ct, self.spec_total_num_forward_ct
        self.spec_num_forward_ct = max(rounds, 1)  # it divides by it: 0 tokens / 1
        super().report_decode_stats(*args, **kwargs)
        if not rounds:
            self.spec_num_forward_ct, self.spec_total_num_forward_ct = 0, total
        if self.exporter is not None:
            self._export()

    def _maybe_log_idle_metrics(self) -> None:
        super()._maybe_log_idle_metrics()
        if self.exporter is not None and time.monotonic() - self._exported_at > _IDLE_EXPORT_S:
            self._export()

    def _export(self) -> None:
        self._exported_at = time.monotonic()
        self.exporter.export(numbers_of(self.scheduler.draft_worker))


def numbers_of(worker: Any) -> Numbers:
    """What a VeriCacheWorker has counted so far."""
    started = worker.requests is not None
    return Numbers(
        drafting=worker.drafting,
        total=worker.requests.total if started else DraftCounters(),
        row_bytes=worker.row_bytes,
        spans=worker.tree_cache.spans.counters if started else SpanCounters(),
        pool_used_tokens=worker.pool.allocator.used,
        pool_tokens=worker.pool.allocator.total,
        phase_seconds=worker.phases.seconds,
        rounds_ahead=worker.planner.rounds_ahead,
        shared_tokens=worker.cascade.saved_tokens if started else 0,
        offload=worker.rotation.numbers() if started else OffloadNumbers(),
    )
