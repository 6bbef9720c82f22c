"""Command-line flags and Engine keywords -> VeriCacheConfig.

One table describes the flags; the parser, ``sgl.Engine(...)`` keywords, the keys of a config
file, the environment variables and the documentation are generated from it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sglang_vericache.config import (
    CASCADE_CHOICES,
    DRAFT_AHEAD_CHOICES,
    DRAFT_DTYPES,
    HORIZON_POLICIES,
    OFFLOAD_CHOICES,
    VERIFY_ATTENTION_CHOICES,
    CompressorSpec,
    VeriCacheConfig,
    VeriCacheConfigError,
    parse_memory,
)
from sglang_vericache.sources import CONFIG, SWITCH, Setting, gather, is_enabled, option_of

# Under this name the scheduler knows us: ServerArgs.speculative_algorithm.
ALGORITHM = "VERICACHE"
# ... and our radix cache: ServerArgs.radix_cache_backend.
RADIX_BACKEND = "vericache"
# The resolved config rides on the ServerArgs record under this name; SGLang lets underscore
# attributes through its seal and pickles them to the scheduler process.
RECORD_ATTRIBUTE = "_vericache"
SWITCH_HELP = "Draft with a compressed KV cache and verify with the full one: the same tokens."
CONFIG_HELP = (
    "Settings from a JSON or YAML file, or JSON text; keys as the flags without --vericache- and "
    "with underscores. A flag wins over the file, the file over the environment "
    "(SGLANG_VERICACHE_HORIZON and so on), that over the default."
)


@dataclass(frozen=True)
class Flag:
    """One setting.

    Attributes:
        name: keyword of ``sgl.Engine``; the command-line flag is derived from it.
        config_field: the field of VeriCacheConfig that it sets.
        convert: user's value -> field value; raises VeriCacheConfigError.
    """

    name: str
    config_field: str
    convert: Callable[[Any], Any]
    metavar: str
    help: str

    @property
    def option(self) -> str:
        return option_of(self.name)


def _number(kind: type, name: str) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        try:
            if isinstance(value, bool):
                raise TypeError("a truth value counts as 0 or 1")
            number = kind(value)
            if isinstance(value, float) and kind is int and number != value:
                raise ValueError("a fraction")
            return number
        except (TypeError, ValueError, OverflowError):
            what = "a whole number" if kind is int else "a number"
            raise VeriCacheConfigError(f"{option_of(name)} {value!r} is not {what}.") from None

    return convert


def _one_of(name: str, accepted: Sequence[str]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        text = str(value).strip().lower()
        if text not in accepted:
            raise VeriCacheConfigError(
                f"{option_of(name)} {value!r} is unknown. Accepted: {', '.join(accepted)}."
            )
        return text

    return convert


def _switch(name: str) -> Callable[[Any], bool]:
    choose = _one_of(name, ("on", "off"))

    def convert(value: Any) -> bool:
        return value if isinstance(value, bool) else choose(value) == "on"

    return convert


def _integer_flag(name: str, config_field: str, help: str) -> Flag:
    return Flag(name, config_field, _number(int, name), "N", help)


FLAGS: tuple[Flag, ...] = (
    Flag(
        "vericache_compressor",
        "compressor",
        CompressorSpec.parse,
        "NAME[:KEY=VALUE,...]",
        "Scorer that selects the tokens of the compressed cache (default snapkv); "
        "`python -m sglang_vericache compressors` lists them.",
    ),
    Flag(
        "vericache_keep_ratio",
        "keep_ratio",
        _number(float, "vericache_keep_ratio"),
        "FRACTION",
        "Fraction of the tokens that the compressed cache keeps, in (0, 1] (default 0.2).",
    ),
    _integer_flag(
        "vericache_keep_min",
        "keep_min_tokens",
        "Tokens that the compressed cache keeps at least, whatever the ratio says; all of a "
        "shorter context; 0: as the ratio says (default 1024).",
    ),
    _integer_flag(
        "vericache_keep_tokens",
        "keep_tokens",
        "Tokens that the compressed cache keeps of each context; instead of a ratio.",
    ),
    Flag(
        "vericache_grow_views",
        "grow_views",
        _switch("vericache_grow_views"),
        "on|off",
        "Keep twice as much of the context of a request whose drafts fail, where the draft pool "
        "has room to spare (default off).",
    ),
    _integer_flag(
        "vericache_horizon",
        "horizon",
        "Tokens drafted before each verification (default 15); with offloading up to twice as many "
        "and one, while the full KV is not on the GPU.",
    ),
    Flag(
        "vericache_horizon_policy",
        "horizon_policy",
        _one_of("vericache_horizon_policy", HORIZON_POLICIES),
        "|".join(HORIZON_POLICIES),
        "Choose the horizon by measured speed, plain decoding included, or keep to it (default "
        "auto: adaptive on a GPU).",
    ),
    _integer_flag(
        "vericache_max_step_ms",
        "max_step_ms",
        "Milliseconds that an adaptive scheduler step should last at most: longer rounds take "
        "several steps (default 30).",
    ),
    Flag(
        "vericache_draft_dtype",
        "draft_dtype",
        _one_of("vericache_draft_dtype", DRAFT_DTYPES),
        "|".join(DRAFT_DTYPES),
        "How the compressed caches are stored (default auto: in 4 bits for a KV pool of 16-bit "
        "numbers, else as that pool).",
    ),
    Flag(
        "vericache_draft_memory",
        "draft_memory_bytes",
        lambda value: parse_memory("--vericache-draft-memory", value),
        "SIZE",
        "Memory of the compressed caches, in GiB or with a unit (512MiB); by default sized from "
        "the KV pool.",
    ),
    _integer_flag(
        "vericache_min_context",
        "min_context_tokens",
        "Contexts shorter than this are decoded without drafting (default 512).",
    ),
    _integer_flag(
        "vericache_stagger",
        "stagger_groups",
        "Running requests take turns verifying in this many groups (default 1: all at once).",
    ),
    Flag(
        "vericache_draft_ahead",
        "draft_ahead",
        _one_of("vericache_draft_ahead", DRAFT_AHEAD_CHOICES),
        "|".join(DRAFT_AHEAD_CHOICES),
        "Draft the next round in the step that verifies this one, so that the GPU does not wait "
        "for the scheduler (default auto: on a GPU, with overlap scheduling and without "
        "--vericache-stagger). Not while some full cache is away from the GPU or is to leave it.",
    ),
    Flag(
        "vericache_verify_attention",
        "verify_attention",
        _one_of("vericache_verify_attention", VERIFY_ATTENTION_CHOICES),
        "|".join(VERIFY_ATTENTION_CHOICES),
        "Verify with the server's attention backend, or with the Triton kernel that draft steps "
        "use, over the full KV (default auto: with the kernel on Hopper GPUs, where it serves "
        "the model, but not with --enable-deterministic-inference; else with the backend).",
    ),
    Flag(
        "vericache_cascade",
        "cascade",
        _one_of("vericache_cascade", CASCADE_CHOICES),
        "|".join(CASCADE_CHOICES),
        "Read a long prefix that many running requests share once a verification, for all of them: "
        "with FlashInfer, where it saves more than it costs (default auto).",
    ),
    _integer_flag(
        "vericache_fold_tail",
        "fold_tail_tokens",
        "Generated tokens kept uncompressed before the older ones are compressed (default 256).",
    ),
    Flag(
        "vericache_offload",
        "offload",
        _one_of("vericache_offload", OFFLOAD_CHOICES),
        "|".join(OFFLOAD_CHOICES),
        "Keep every full cache on the host as well, and let running requests leave the GPU between "
        "their verifications where memory is short, so that more run: where that promises more "
        "tokens a second, or always (default off).",
    ),
    Flag(
        "vericache_host_memory",
        "host_memory_bytes",
        lambda value: parse_memory("--vericache-host-memory", value),
        "SIZE",
        "Host memory for the full caches, in GiB or with a unit (512MiB); by default sized from "
        "the KV pool and what is free.",
    ),
    Flag(
        "vericache_offload_checksums",
        "offload_checksums",
        _switch("vericache_offload_checksums"),
        "on|off",
        "Check what comes back from the host against what was written there, and compute again "
        "what differs (default off).",
    ),
    Flag(
        "vericache_loader_watch",
        "loader_watch",
        str,
        "ipc:///PATH",
        "Publish the messages to and from the loader thread at PATH.scheduler and PATH.loader, for "
        "another process to watch.",
    ),
)

# Keywords of Engine, the switch first.
NAMES = (SWITCH, CONFIG, *(flag.name for flag in FLAGS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to SGLang's parser; values stay raw until `config_from`."""
    group = parser.add_argument_group("vericache")
    group.add_argument(
        "--enable-vericache",
        dest=SWITCH,
        action="store_true",
        default=None,  # not given, so that the environment may decide
        help=SWITCH_HELP,
    )
    group.add_argument(
        option_of(CONFIG),
        dest=CONFIG,
        metavar="FILE|JSON",
        default=None,
        help=CONFIG_HELP,
    )
    for flag in FLAGS:
        group.add_argument(
            flag.option, dest=flag.name, metavar=flag.metavar, default=None, help=flag.help
        )


def config_from(
    values: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> VeriCacheConfig | None:
    """Config of raw flag values (name -> value, None when not given), or None without the switch.

    Args:
        environ: by default this process's.

    Raises:
        VeriCacheConfigError: a bad value, or a flag without ``--enable-vericache``.
    """
    environ = os.environ if environ is None else environ
    if not is_enabled(values, environ):
        names = (CONFIG, *(flag.name for flag in FLAGS))
        idle = [option_of(name) for name in names if values.get(name) is not None]
        if idle:
            raise VeriCacheConfigError(
                f"{', '.join(idle)} has no effect without --enable-vericache: add it."
            )
        return None
    given = gather([flag.name for flag in FLAGS], values, environ)
    settings = {f.config_field: _convert(f, given[f.name]) for f in FLAGS if f.name in given}
    if "keep_tokens" in settings:
        settings = {"keep_ratio": None, "keep_min_tokens": 0} | settings
    # Imported here: the registry imports torch, which `--help` should not wait for.
    from sglang_vericache.compressors.registry import create_scorer

    try:
        # Here and not in the config, whose default for the one is no contradiction to the other.
        if "keep_tokens" in settings and settings["keep_min_tokens"]:
            raise VeriCacheConfigError(
                "--vericache-keep-min has no effect with --vericache-keep-tokens: leave one out."
            )
        config = VeriCacheConfig(**settings, sources=_sources(given))
        create_scorer(config.compressor)
    except VeriCacheConfigError as error:
        raise VeriCacheConfigError(_with_origins(str(error), given)) from None
    return config


def _convert(flag: Flag, setting: Setting) -> Any:
    try:
        return flag.convert(setting.value)
    except VeriCacheConfigError as error:
        raise VeriCacheConfigError(_with_origins(str(error), {flag.name: setting})) from None


def _with_origins(message: str, given: Mapping[str, Setting]) -> str:
    """``message`` with the place of each setting it names that was not given by its flag."""
    named = [flag for flag in FLAGS if flag.name in given and flag.option in message]
    origins = [given[flag.name].origin for flag in named]
    elsewhere = [origin for origin in origins if not origin.startswith("flag ")]
    return f"{message} (Set by {', '.join(elsewhere)}.)" if elsewhere else message


def _sources(given: Mapping[str, Setting]) -> tuple[tuple[str, str], ...]:
    origins = {flag.config_field: given[flag.name].origin for flag in FLAGS if flag.name in given}
    if "keep_tokens" in origins:
        origins = dict.fromkeys(("keep_ratio", "keep_min_tokens"), origins["keep_tokens"]) | origins
    names = [field.name for field in fields(VeriCacheConfig) if field.name != "sources"]
    return tuple((name, origins.get(name, "default")) for name in names)


def take_keywords(keywords: dict[str, Any]) -> VeriCacheConfig | None:
    """Remove our keywords from Engine's and return their config (None without the switch)."""
    return config_from({name: keywords.pop(name) for name in NAMES if name in keywords})


def config_of(server_args: Any) -> VeriCacheConfig | None:
    """The config that rides on a ServerArgs record, or None when the flag is off."""
    return getattr(server_args, RECORD_ATTRIBUTE, None)
