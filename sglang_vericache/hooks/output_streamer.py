"""What a step sends to the client."""

from __future__ import annotations

from sglang_vericache.hooks import Hook


def output_streamer_class(original, scheduler):
    from sglang_vericache.flags import config_of

    if config_of(scheduler.server_args) is None:
        return original(scheduler)
    from sglang_vericache.output_streamer import streamer_class

    return streamer_class(scheduler.draft_worker)


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class",
        "around",
        output_streamer_class,
        "a registered algorithm cannot choose the output streamer: responses carry no counters",
        "0006-request-level-info.patch",
        "sglang.srt.speculative.spec_registry.CustomSpecAlgo.get_output_streamer_class",
    ),
)
