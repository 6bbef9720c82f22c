"""The one configuration object: every layer takes it, nobody reads flags or environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

# Attention sinks (StreamingLLM, arXiv 2309.17453) and the most recent tokens of a path are kept
# by every selection: dropping either ruins the draft at once, whatever the scorer says.
SINK_TOKENS = 4
RECENT_TOKENS = 64

# Names of kernels.formats.FORMATS, which importing would bring torch with it.
HORIZON_POLICIES = ("auto", "adaptive", "fixed")
DRAFT_AHEAD_CHOICES = ("auto", "on", "off")
OFF, AUTO, ALWAYS = "off", "auto", "always"
CASCADE_CHOICES = (AUTO, OFF)
BACKEND, TRITON = "backend", "triton"
VERIFY_ATTENTION_CHOICES = (AUTO, BACKEND, TRITON)
OFFLOAD_CHOICES = (OFF, AUTO, ALWAYS)
DRAFT_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8_e4m3", "int4")

_MEMORY_UNITS = {"": 1 << 30, "GIB": 1 << 30, "MIB": 1 << 20, "KIB": 1 << 10}


class VeriCacheConfigError(ValueError):
    """A flag has a value that cannot work; the message names the flag and what is accepted."""


@dataclass(frozen=True)
class CompressorSpec:
    """What ``--vericache-compressor NAME[:key=value,...]`` says, before the registry checks it."""

    name: str = "snapkv"
    params: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def parse(cls, text: str) -> CompressorSpec:
        """Parse ``NAME[:key=value,...]``.

        Raises:
            VeriCacheConfigError: a parameter is not of the form ``key=value``.
        """
        name, _, tail = str(text).strip().partition(":")
        params: dict[str, str] = {}
        for part in filter(None, (p.strip() for p in tail.split(","))):
            key, equals, value = part.partition("=")
            if not equals or not key.strip() or not value.strip():
                raise VeriCacheConfigError(
                    f"--vericache-compressor {text!r}: {part!r} is not of the form key=value. "
                    "Accepted: NAME or NAME:key=value,key=value."
                )
            if key.strip() in params:
                raise VeriCacheConfigError(
                    f"--vericache-compressor {text!r}: {key.strip()} is given twice."
                )
            params[key.strip()] = value.strip()
        return cls(name=name.strip().lower(), params=MappingProxyType(params))

    def __str__(self) -> str:
        tail = ",".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.name}:{tail}" if tail else self.name

    def __reduce__(self) -> tuple[Any, ...]:
        # A mappingproxy does not pickle, and the record travels to the scheduler process.
        return (_rebuild_spec, (self.name, dict(self.params)))


def _rebuild_spec(name: str, params: dict[str, str]) -> CompressorSpec:
    return CompressorSpec(name, MappingProxyType(params))


@dataclass(frozen=True)
class VeriCacheConfig:
    """Resolved settings of one server.

    Attributes:
        compressor: which scorer selects the tokens of a span.
        keep_ratio: fraction of a path's tokens that its spans keep; None when keep_tokens is set.
        keep_tokens: tokens that the spans of one path keep in all; None when keep_ratio is set.
        keep_min_tokens: tokens that they keep at least, whatever keep_ratio says: of a short
            context a fraction is too little, and keeping all of it costs next to nothing.
        grow_views: a request whose drafts fail gets a view that keeps twice as much.
        horizon: draft tokens per round (k); a verify pass reads k + 1 tokens.
        horizon_policy: "adaptive" chooses among horizons up to that one, plain decoding included,
            by expected tokens a second; "fixed" keeps to it; "auto" is adaptive on a GPU.
        max_step_ms: milliseconds that an adaptive scheduler step should last at most: a round
            takes several steps, or a step several plain tokens, to come near it.
        draft_dtype: pool format of the compressed KV; "auto" is int4 for a KV pool of 16-bit
            numbers, and keeps others.
        draft_memory_bytes: size of the draft pool; None means sized from the main pool.
        min_context_tokens: shorter contexts are decoded plainly.
        stagger_groups: the running requests take turns verifying in this many groups.
        draft_ahead: the next round is drafted in the step that verifies this one, so that the
            device drafts while the host prepares the next verification; "auto" where that pays.
        verify_attention: "backend" verifies with the server's attention backend, "triton" with the
            kernel that draft steps use, "auto" with that kernel on Hopper GPUs in place of a dense
            backend, where it serves the model and the server is not to be deterministic, and with
            the backend elsewhere.
        cascade: "auto" reads a prefix that running requests share once a verification, where that
            saves much.
        fold_tail_tokens: a tail longer than this is folded into a span.
        offload: "auto" lets the full KV of running requests leave the GPU where memory is short and
            that promises more tokens a second, "always" wherever memory is short.
        host_memory_bytes: size of the host pool; None means sized from what is free.
        offload_checksums: what comes back from the host is checked, and computed again where it
            differs from what was written.
        loader_watch: address at which another process may listen to the loader's messages.
        verify_chunk_rows: rows of logits that exist at a time during a verify pass.
        sources: (field, where its value came from); empty for a config made in code.
    """

    compressor: CompressorSpec = CompressorSpec()
    keep_ratio: float | None = 0.2
    keep_tokens: int | None = None
    keep_min_tokens: int = 1024
    grow_views: bool = False
    horizon: int = 15
    horizon_policy: str = "auto"
    max_step_ms: int = 30
    draft_dtype: str = "auto"
    draft_memory_bytes: int | None = None
    min_context_tokens: int = 512
    stagger_groups: int = 1
    draft_ahead: str = "auto"
    verify_attention: str = AUTO
    cascade: str = AUTO
    fold_tail_tokens: int = 256
    offload: str = OFF
    host_memory_bytes: int | None = None
    offload_checksums: bool = False
    loader_watch: str | None = None
    verify_chunk_rows: int = 512
    sources: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.keep_tokens is None):
            raise VeriCacheConfigError(
                "--vericache-keep-ratio and --vericache-keep-tokens are alternatives: give one."
            )
        if self.keep_ratio is not None and not 0.0 < self.keep_ratio <= 1.0:
            raise VeriCacheConfigError(
                f"--vericache-keep-ratio {self.keep_ratio} is outside (0, 1]: it is the fraction "
                "of tokens that the compressed cache keeps, for example 0.2."
            )
        _at_least("--vericache-keep-tokens", self.keep_tokens, 1)
        _at_least("--vericache-keep-min", self.keep_min_tokens, 0)
        _at_least("--vericache-horizon", self.horizon, 1)
        _at_least("--vericache-max-step-ms", self.max_step_ms, 1)
        _at_least("--vericache-min-context", self.min_context_tokens, 1)
        _at_least("--vericache-stagger", self.stagger_groups, 1)
        _at_least("--vericache-fold-tail", self.fold_tail_tokens, RECENT_TOKENS + 1)
        _at_least("--vericache-draft-memory", self.draft_memory_bytes, 1)
        _at_least("--vericache-host-memory", self.host_memory_bytes, 1)
        if self.draft_ahead == "on" and self.stagger_groups > 1:
            raise VeriCacheConfigError(
                "--vericache-draft-ahead on needs all requests to be verified together: use it "
                "without --vericache-stagger."
            )
        if self.loader_watch is not None and not self.loader_watch.startswith("ipc:///"):
            raise VeriCacheConfigError(
                f"--vericache-loader-watch {self.loader_watch!r} is not an address of this "
                "machine. Accepted: ipc:// and an absolute path, for example "
                "ipc:///run/vericache-loader."
            )
        for flag, value in (
            ("--vericache-host-memory", self.host_memory_bytes),
            ("--vericache-offload-checksums", self.offload_checksums or None),
            ("--vericache-loader-watch", self.loader_watch),
        ):
            if value is not None and self.offload == OFF:
                raise VeriCacheConfigError(
                    f"{flag} has no effect without --vericache-offload auto: add it."
                )
        _at_least("verify_chunk_rows", self.verify_chunk_rows, 1)

    @property
    def verify_width(self) -> int:
        """Most tokens of a request in one verify pass: the pending one and the drafted ones."""
        return self.deepest + 1

    @property
    def deepest(self) -> int:
        """Most tokens that a request may draft before a verification: more than the horizon only
        while its full KV is not on the device, because then the link is what it waits for."""
        return self.horizon if self.offload == OFF else 2 * self.horizon + 1

    def drafts_ahead(self, host_runs_ahead: bool) -> bool:
        """Whether the step that verifies a round drafts the next one, as long as nobody's full KV
        leaves the device.

        Args:
            host_runs_ahead: it prepares a step while the device works on the one before: else
                nothing is gained by drafting for requests that may have ended.
        """
        if self.draft_ahead == "auto":
            return host_runs_ahead and self.stagger_groups == 1
        return self.draft_ahead == "on"

    def verifies_with_kernel(self, preferred: bool, deterministic: bool) -> bool:
        """Whether verify passes leave the server's attention backend, where the kernel holds them.

        Args:
            preferred: on such a device, to that backend.
            deterministic: SGLang's mode, in which a token is what that backend's kernels give.
        """
        if self.verify_attention == AUTO:
            return preferred and not deterministic
        return self.verify_attention == TRITON

    @property
    def views_grow(self) -> bool:
        """A constant that was asked for stays one."""
        return self.grow_views and self.keep_tokens is None

    @property
    def max_step_seconds(self) -> float:
        return self.max_step_ms / 1000

    @property
    def tail_capacity(self) -> int:
        """Draft slots that one request's tail can hold."""
        return self.fold_tail_tokens + self.draft_reserve

    @property
    def draft_reserve(self) -> int:
        """Draft slots that a step may fill beyond the committed tokens: what a verification may
        accept, and a round that may be drafted ahead behind it."""
        ahead = self.horizon + 1 if self.drafts_ahead(host_runs_ahead=True) else 0
        return self.verify_width + ahead

    def __str__(self) -> str:
        """Each setting with its source, for the log."""
        sources = dict(self.sources)
        return ", ".join(
            f"{name}={value} ({sources.get(name, 'code')})"
            for name, value in self.describe().items()
            if name != "sources"
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for logs and the server's info endpoint."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"compressor": str(self.compressor), "sources": dict(self.sources)}


def _at_least(flag: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise VeriCacheConfigError(f"{flag} {value} is too small: the least accepted is {minimum}.")


def parse_memory(flag: str, text: str | int | float) -> int:
    """Bytes of ``text``: a number of GiB, or a number with the unit GiB, MiB or KiB.

    Raises:
        VeriCacheConfigError: not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    unit = _MEMORY_UNITS.get(match[2].upper()) if match else None
    size = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= size < 1 << 60:
        raise VeriCacheConfigError(
            f"{flag} {text!r} is not a size. Accepted: a number of GiB such as 2 or 0.5, "
            "or a number with a unit such as 512MiB."
        )
    return int(size)
