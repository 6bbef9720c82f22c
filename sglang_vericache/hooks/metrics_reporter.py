"""The scheduler's metrics."""

from __future__ import annotations

from sglang_vericache.hooks import Hook


def init_metrics_reporter(original, scheduler) -> None:
    """SGLang marks this method as the place to put another reporter in."""
    from sglang_vericache.flags import config_of

    if config_of(scheduler.server_args) is None:
        return original(scheduler)
    from sglang_vericache.metrics_reporter import VeriCacheMetricsReporter

    scheduler.metrics_reporter = VeriCacheMetricsReporter(
        scheduler=scheduler,
        metrics_collector_context=scheduler.metrics_collector_context,
        metrics_collector=scheduler.metrics_collector,
    )


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_metrics_reporter",
        "around",
        init_metrics_reporter,
        "acceptance is averaged over steps that verify nothing, and a registered algorithm cannot "
        "export metrics",
        "0011-speculative-metrics-of-rounds.patch",
        "sglang.srt.speculative.spec_registry.CustomSpecAlgo.get_metrics_reporter_class",
    ),
)
