"""The flag on every way to start SGLang.

SGLang's ServerArgs is a record with fixed fields, so the command line and Engine are hooked. Where
plugins can declare fields (patches/0001), `server_fields` does, and a resolution hook of SGLang's
own is all that remains.
"""

from __future__ import annotations

import sys

from sglang_vericache import flags
from sglang_vericache.config import VeriCacheConfigError
from sglang_vericache.hooks import Hook

PATCH = "0001-plugin-server-args.patch"
# The patch adds a mechanism; this is what it gives us, if our entry point is installed.
ADDED = f"sglang.srt.server_args.ServerArgs.{flags.SWITCH}"


def add_cli_args(original, parser) -> None:
    original(parser)
    flags.add_arguments(parser)


def from_cli_args(original, cls, args):
    """Resolve our flags, then let SGLang build its record with the algorithm set."""
    from sglang_vericache import plugin
    from sglang_vericache.cpu import engine

    try:
        config = flags.config_from(vars(args))
        if config is None:
            return original(cls, args)
        args.speculative_algorithm = _algorithm(args.speculative_algorithm)
        plugin.check_version()
        engine.ensure_server()
        plugin.arm()
    except (VeriCacheConfigError, plugin.PluginError) as error:
        # A command line gets a sentence; Engine(...) gets the exception.
        sys.exit(f"error: {error}")
    args.attention_backend = args.attention_backend or engine.default_attention_backend()
    record = original(cls, args)
    setattr(record, flags.RECORD_ATTRIBUTE, config)
    return record


def engine_server_args(**keywords):
    """What ``sgl.Engine(**keywords)`` builds its record with."""
    from sglang.srt.server_args import ServerArgs

    from sglang_vericache import plugin
    from sglang_vericache.cpu import engine

    config = flags.take_keywords(keywords)
    if config is None:
        return ServerArgs(**keywords)
    keywords["speculative_algorithm"] = _algorithm(keywords.get("speculative_algorithm"))
    plugin.check_version()
    engine.ensure_library_user()
    plugin.arm()
    backend = keywords.get("attention_backend") or engine.default_attention_backend()
    record = ServerArgs(**(keywords | {"attention_backend": backend}))
    setattr(record, flags.RECORD_ATTRIBUTE, config)
    return record


def hook_engine() -> None:
    """Let Engine take our keywords.

    Not a hook of the registry: Engine.__init__ is running when it loads the plugins, and a
    registry hook on the class attribute would replace ServerArgs in every module.
    """
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is not None:
        module.Engine.server_args_class = staticmethod(engine_server_args)


def resolve_fields(record, previous) -> None:
    """A resolution hook: ``previous`` is the step of SGLang's that it comes before."""
    from sglang_vericache import plugin

    try:
        _resolve_fields(record)
    except (VeriCacheConfigError, plugin.PluginError) as error:
        if _from_command_line(record):
            sys.exit(f"error: {error}")
        raise
    previous(record)


def _resolve_fields(record) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution

    from sglang_vericache import plugin
    from sglang_vericache.cpu import engine

    config = flags.config_from({name: getattr(record, name) for name in flags.NAMES})
    if config is None:
        return
    declared = {"speculative_algorithm": _algorithm(record.speculative_algorithm)}
    plugin.check_version()
    if _from_command_line(record):
        engine.ensure_server()
    else:
        engine.ensure_library_user()
    plugin.arm()
    backend = engine.default_attention_backend()
    if record.attention_backend is None and backend is not None:
        declared["attention_backend"] = backend
    declare_resolution(record, "vericache", **declared)
    setattr(record, flags.RECORD_ATTRIBUTE, config)


def _from_command_line(record) -> bool:
    command = record.launch_command
    return command is not None and not command.startswith("Engine(")


def hook_resolution() -> None:
    """Resolve our fields before anything of SGLang reads the speculative algorithm."""
    from sglang.srt.arg_groups import resolution_hooks

    # The step that has the same precondition: it may reset the algorithm.
    step = "handle_aux_hidden_state_capture"
    if resolve_fields not in resolution_hooks._HOOKS.get(step, ()):
        resolution_hooks.register_resolution_hook(step)(resolve_fields)


def _algorithm(chosen: str | None) -> str:
    if chosen not in (None, flags.ALGORITHM):
        raise VeriCacheConfigError(
            f"--enable-vericache is a speculative algorithm itself and does not compose with "
            f"--speculative-algorithm {chosen} yet: give one of the two."
        )
    return flags.ALGORITHM


HOOKS = (
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "around",
        add_cli_args,
        "a plugin cannot add fields to ServerArgs",
        PATCH,
        ADDED,
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "around",
        from_cli_args,
        "a plugin cannot add fields to ServerArgs",
        PATCH,
        ADDED,
    ),
)
