"""The host tier: SGLang's HiCache, switched on and sized by --vericache-offload alone."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from sglang_vericache.config import OFF, VeriCacheConfig, VeriCacheConfigError
from sglang_vericache.cpu import engine
from sglang_vericache.pool.sizing import HostTier

logger = logging.getLogger(__name__)

# Host pool by device pool, where memory allows: SGLang lowers it to what fits.
RATIO = 8.0
# A host pool below this serves nobody.
LEAST_BYTES = 256 << 20
# What a user may have set of HiCache, SGLang's default for it, and the flag.
CONTRADICTIONS = (
    ("hicache_write_policy", "write_through", "--hicache-write-policy"),
    ("hicache_host_memory_mode", "cache", "--hicache-host-memory-mode"),
    ("hicache_storage_backend", None, "--hicache-storage-backend"),
    ("hicache_size", 0, "--hicache-size"),
    ("disable_radix_cache", False, "--disable-radix-cache"),
)


def switch_on(server_args: Any, config: VeriCacheConfig) -> None:
    """Declare HiCache, unless the host has no memory for it: then a sentence, and no offloading.

    Raises:
        VeriCacheConfigError: the size that was asked for cannot be had, or another flag wants
            another host tier.
    """
    for attribute, accepted, flag in CONTRADICTIONS:
        value = getattr(server_args, attribute, accepted)
        if value != accepted:
            raise VeriCacheConfigError(
                f"--vericache-offload does not work with {flag} {value}: leave that flag out."
            )
    free = free_bytes()
    wanted = config.host_memory_bytes
    if wanted is not None and wanted > free:
        raise VeriCacheConfigError(
            f"--vericache-host-memory {wanted / 2**30:.1f} GiB is more than can be had: "
            f"{max(free, 0) / 2**30:.1f} GiB of host memory are free beside what SGLang leaves to "
            "others. Give less, or leave the flag out."
        )
    if wanted is None and free < LEAST_BYTES:
        logger.warning(
            "--vericache-offload is without effect: %.1f GiB of host memory are free beside "
            "what SGLang leaves to others; everything stays on the GPU.",
            max(free, 0) / 2**30,
        )
        return
    server_args.enable_hierarchical_cache = True
    server_args.hicache_write_policy = "write_through"
    server_args.hicache_mem_layout = "layer_first"
    if engine.in_use():
        server_args.hicache_io_backend = "direct"
    if wanted is not None:
        # SGLang counts in 10^9 bytes; its whole numbers are too coarse for small machines.
        server_args.hicache_size = wanted / 1e9
        # SGLang takes a share of what is free where no size is given, and has decided by now.
        server_args.hicache_host_memory_fraction = None
    elif server_args.hicache_host_memory_fraction is not None:  # None: --hicache-ratio is given
        server_args.hicache_ratio = RATIO


def tier_of(server_args: Any, config: VeriCacheConfig, model: Any) -> HostTier | None:
    """What the draft pool's size depends on, before the host pool is there; None without one.

    Args:
        model: loaded; what counts is the weights on this device.
    """
    if config.offload == OFF or not server_args.enable_hierarchical_cache:
        return None
    from sglang.srt.runtime_context import get_memory

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if config.host_memory_bytes is not None:
        return HostTier(config.host_memory_bytes, None, weights)
    return HostTier(foreseen_bytes(), get_memory().hicache_ratio, weights)


@cache
def foreseen_bytes() -> int:
    """Of a host pool that is sized from what is free. Asked once, because what is free changes
    between the time when the draft pool's memory is reserved and when it is allocated."""
    from sglang.srt.runtime_context import get_memory

    return int(max(free_bytes(), 0) * (get_memory().hicache_host_memory_fraction or 1.0))


@contextmanager
def making_pool() -> Iterator[None]:
    """Where SGLang allocates and pins the host pool: a failure names the limit and the flag.

    Raises:
        VeriCacheConfigError: instead of whatever was raised inside.
    """
    try:
        yield
    except (RuntimeError, ValueError, MemoryError, OSError) as error:
        lockable, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limits = {"are free": max(free_bytes(), 0)}
        if lockable != resource.RLIM_INFINITY:
            limits["may be locked by this process (ulimit -l)"] = lockable
        told = " and ".join(f"{size / 2**30:.1f} GiB {what}" for what, size in limits.items())
        fitting = int(min(limits.values()) * 0.9) >> 20
        advice = (
            f"Give --vericache-host-memory {fitting}MiB or less"
            if fitting
            else "Raise that limit, or leave --vericache-offload out"
        )
        raise VeriCacheConfigError(
            f"--vericache-offload: the host pool cannot be allocated and pinned ({error}). "
            f"{told}. {advice}."
        ) from error


def report_room(host_tokens: int, context_tokens: int) -> None:
    """Say that a host pool is too small for some requests: they stay on the GPU."""
    if host_tokens < context_tokens:
        logger.warning(
            "--vericache-host-memory: the host pool holds %d tokens, a context may have %d. What "
            "it cannot hold stays on the GPU.",
            host_tokens,
            context_tokens,
        )


def free_bytes() -> int:
    """Host memory that a pool may take, within cgroup limits."""
    from sglang.srt.mem_cache.pool_host.base import HICACHE_HOST_MEMORY_RESERVE_BYTES

    from sglang_vericache.cpu.host_pool import RESERVE_BYTES

    try:
        from sglang.srt.mem_cache.host_memory import available_host_memory_bytes

        available = available_host_memory_bytes(allow_cgroup_fallback=True)
    except (OSError, ValueError) as error:
        raise VeriCacheConfigError(
            f"--vericache-offload: how much host memory is free cannot be told ({error})."
        ) from None
    reserve = RESERVE_BYTES if engine.in_use() else HICACHE_HOST_MEMORY_RESERVE_BYTES
    return available - reserve
