"""Counters in the server's info endpoint."""

from __future__ import annotations

from sglang_vericache.hooks import Hook


def add_vericache(result, controller, state) -> None:
    worker = controller.scheduler.draft_worker
    if hasattr(worker, "get_internal_state"):
        state.update(worker.get_internal_state())


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler_components.internal_state"
        ".SchedulerInternalStateController._add_speculative",
        "after",
        add_vericache,
        "a registered algorithm cannot contribute to /server_info",
        "0006-request-level-info.patch",
        "sglang.srt.speculative.base_spec_worker.BaseSpecWorker.get_internal_state",
    ),
)
