"""The flag on every way to start SGLang."""

from __future__ import annotations

import sys

from sglang_vericache import flags
from sglang_vericache.config import VeriCacheConfigError
from sglang_vericache.hooks import Hook

PATCH = "0001-server-args-vericache.patch"


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
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "around",
        from_cli_args,
        "a plugin cannot add fields to ServerArgs",
        PATCH,
    ),
)
