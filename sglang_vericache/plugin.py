"""Entry point of the plugin: the only place where something is registered or hooked.

SGLang only logs what a plugin raises and what a hook's target lacks, and serves without it. So
failures are stored here, and using the flag raises them.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name

from sglang_vericache import PINNED_SGLANG
from sglang_vericache.hooks import Hook, flag_hooks, missing_target, server_hooks

# A spawned process loads plugins before it knows its ServerArgs: it inherits this instead.
_ARMED = "_SGLANG_VERICACHE_ARMED"


class PluginError(RuntimeError):
    """The plugin cannot work in this installation; the message says why."""


@dataclass(frozen=True)
class Failure:
    """Something that `activate` could not do."""

    what: str
    why: str


_failures: list[Failure] = []


def activate() -> None:
    """Called by SGLang in every process, before it knows its flags."""
    if installed_sglang() != PINNED_SGLANG:
        # What a hook would do to another release nobody knows, and the flag is not known there.
        _refuse_if_asked_for()
        return
    _attempt("the flag", _introduce_flag)
    if os.environ.get(_ARMED):
        try:
            arm()
        except PluginError as error:
            # An exception would only be logged, and the server would run without us.
            sys.exit(f"error: {error}")


def arm() -> None:
    """Register the algorithm and apply the hooks of a server that uses the flag.

    A second call does nothing; processes spawned from here are armed as they load plugins.

    Raises:
        PluginError: another release of SGLang, a missing hook target, a failed registration.
    """
    check_version()
    _attempt("the speculative algorithm", _register_algorithm)
    _attempt("what replaces hooks", _register_instead)
    hooks = [hook for hook in server_hooks() if applies(hook)]
    flags = [hook for hook in flag_hooks() if applies(hook)]
    missing = {hook.target: missing_target(hook.target) for hook in (*flags, *hooks)}
    problems = [f"{f.what}: {f.why}" for f in _failures]
    problems += [f"hook target {target} {why}" for target, why in missing.items() if why]
    if problems:
        raise PluginError("--enable-vericache cannot be used: " + "; ".join(problems))
    _register(hooks)
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    unapplied = [hook.target for hook in hooks if not is_applied(hook)]
    if unapplied:
        raise PluginError(f"SGLang could not wrap {', '.join(unapplied)}: see its log.")
    os.environ[_ARMED] = "1"


def _refuse_if_asked_for() -> None:
    """Exit where this process was told to use the plugin, as far as can be seen without its flags:
    an exception would only be logged, and the server would run without us."""
    from sglang_vericache.config import VeriCacheConfigError
    from sglang_vericache.sources import SWITCH, is_enabled, option_of

    given = True if option_of(SWITCH) in sys.argv else None
    try:
        if _ARMED in os.environ or is_enabled({SWITCH: given}, os.environ):
            check_version()
    except (PluginError, VeriCacheConfigError) as error:
        sys.exit(f"error: {error}")


def check_version() -> None:
    """Refuse any SGLang but the pinned one.

    Raises:
        PluginError: naming both versions.
    """
    found = installed_sglang()
    if found != PINNED_SGLANG:
        raise PluginError(
            f"--enable-vericache needs sglang=={PINNED_SGLANG}, found {found or 'none'}: "
            f"pip install sglang=={PINNED_SGLANG}"
        )


def installed_sglang() -> str | None:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def applies(hook: Hook) -> bool:
    """Whether this process needs the hook."""
    return is_relevant(hook) and hook.needed


def is_relevant(hook: Hook) -> bool:
    """Whether the hook's function of SGLang is used in this process."""
    from sglang_vericache.cpu import engine

    return not hook.cpu_only or engine.in_use()


def is_applied(hook: Hook) -> bool:
    """Whether the hook's function is in the chain of wrappers around its target."""
    owner, _, attribute = hook.target.rpartition(".")
    function = getattr(resolve_name(owner), attribute)
    while function is not None:
        cells = getattr(function, "__func__", function).__closure__ or ()
        if any(cell.cell_contents is hook.function for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def applied_hooks() -> list[str]:
    """Functions of SGLang that the plugin wraps in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = (*flag_hooks(), *server_hooks())
    return [h.target for h in hooks if h.target in HookRegistry._patched and is_applied(h)]


def failures() -> tuple[Failure, ...]:
    return tuple(_failures)


def _register(hooks: Iterable[Hook]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        known = HookRegistry._hooks.get(hook.target, ())
        if any(function is hook.function for _, function, _ in known):
            continue
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))
        if hook.target in HookRegistry._patched:
            # Another plugin's hook is applied already, and SGLang would skip the target.
            HookRegistry._apply_target(hook.target, HookRegistry._hooks[hook.target][-1:])


def _attempt(what: str, step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as error:  # kept for `arm`, which raises it
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno}"
        _failures.append(Failure(what, f"{type(error).__name__}: {error} ({where})"))


def _register_algorithm() -> None:
    from sglang.srt.speculative.spec_registry import get_spec

    from sglang_vericache import algorithm
    from sglang_vericache.flags import ALGORITHM

    if get_spec(ALGORITHM) is None:
        algorithm.register()


def _register_instead() -> None:
    """Tell a patched SGLang what the hooks that it makes unnecessary would do."""
    for register in {hook.instead for hook in server_hooks() if not hook.needed} - {None}:
        register()


def _introduce_flag() -> None:
    """On the command line and as keywords of Engine."""
    from sglang_vericache.hooks import server_args

    hooks = [hook for hook in flag_hooks() if applies(hook)]
    if hooks:
        _register(hooks)
        server_args.hook_engine()
    else:
        server_args.hook_resolution()
