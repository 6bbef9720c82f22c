"""Functions of SGLang that the plugin wraps: one file each, every one with the patch it stands for.

The two lists here are all of them. Flag hooks make the flag known and are always there; server
hooks are applied in the processes of a server that uses it. An SGLang that has what a hook's
patch adds goes without the hook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name


@dataclass(frozen=True)
class Hook:
    """One wrapped function.

    Attributes:
        target: dotted path of the function in SGLang.
        kind: ``before``, ``after`` or ``around``, as in sglang.srt.plugins.hook_registry.
        function: takes the original first when ``around``, the result first when ``after``.
        reason: what goes wrong without it.
        patch: the file in patches/ that would make it unnecessary.
        unless: dotted path of what that patch adds to SGLang.
        instead: tells what the patch adds about us, where SGLang does not ask the algorithm or
            its worker; twice does no harm.
        cpu_only: needed only where SGLang runs its CPU engine.
    """

    target: str
    kind: str
    function: Callable
    reason: str
    patch: str
    unless: str | None = None
    instead: Callable[[], None] | None = None
    cpu_only: bool = False

    @property
    def needed(self) -> bool:
        """Whether the installed SGLang lacks what the patch adds."""
        return self.unless is None or missing_target(self.unless) is not None


def missing_target(target: str) -> str | None:
    """Why a dotted path of SGLang cannot be found, or None when it is there."""
    owner, _, attribute = target.rpartition(".")
    try:
        found = hasattr(resolve_name(owner), attribute)
    except (ImportError, AttributeError) as error:
        return f"cannot be imported ({error})"
    return None if found else "is missing"


def flag_hooks() -> tuple[Hook, ...]:
    from sglang_vericache.hooks import server_args

    return server_args.HOOKS


def server_hooks() -> tuple[Hook, ...]:
    from sglang_vericache.cpu import torch_native_verify
    from sglang_vericache.hooks import (
        decode_reserve,
        finish_state,
        first_tokens,
        grammar,
        http_server,
        internal_state,
        logits_processor,
        metrics_reporter,
        openai_responses,
        output_streamer,
        pool_budget,
        pool_room,
        request_options,
        response_fields,
        spec_metrics,
    )

    return (
        *decode_reserve.HOOKS,
        *finish_state.HOOKS,
        *first_tokens.HOOKS,
        *grammar.HOOKS,
        *http_server.HOOKS,
        *internal_state.HOOKS,
        *logits_processor.HOOKS,
        *metrics_reporter.HOOKS,
        *openai_responses.HOOKS,
        *output_streamer.HOOKS,
        *pool_budget.HOOKS,
        *pool_room.HOOKS,
        *request_options.HOOKS,
        *response_fields.HOOKS,
        *spec_metrics.HOOKS,
        *torch_native_verify.HOOKS,
    )
