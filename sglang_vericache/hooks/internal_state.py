"""Counters in the server's info endpoint, and the switch among its updates."""

from __future__ import annotations

from sglang_vericache.hooks import Hook

# The key of POST /set_internal_state, which POST /vericache uses.
SWITCH = "vericache_drafting"


def add_vericache(result, controller, state) -> None:
    worker = controller.scheduler.draft_worker
    if hasattr(worker, "get_internal_state"):
        state.update(worker.get_internal_state())


def add_switch(handlers, controller) -> None:
    from sglang.srt.managers.scheduler_components.internal_state import _UpdateHandler

    worker = controller.scheduler.draft_worker
    if hasattr(worker, "switch_drafting"):
        for key, functions in update_handlers(worker).items():
            handlers[key] = _UpdateHandler(*functions)


def update_handlers(worker) -> dict[str, tuple]:
    """Drafting on and off, as SGLang's own run-time settings: numbers only."""
    from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected

    def validate(key: str, value: int | float) -> None:
        if value not in (0, 1):
            raise UpdateRejected(f"{key} {value} is neither 0 nor 1.")

    def apply(key: str, value: int | float) -> None:
        worker.switch_drafting(bool(value))

    return {SWITCH: (validate, apply)}


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
    Hook(
        "sglang.srt.managers.scheduler_components.internal_state"
        ".SchedulerInternalStateController._update_handlers",
        "after",
        add_switch,
        "a registered algorithm cannot be told anything at run time",
        "0012-speculative-run-time-switch.patch",
        "sglang.srt.speculative.base_spec_worker.BaseSpecWorker.get_update_handlers",
    ),
)
