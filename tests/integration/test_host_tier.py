"""The host tier is switched on and sized by one flag, or left out with a sentence."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from sglang_vericache import host_tier
from sglang_vericache.config import VeriCacheConfig, VeriCacheConfigError
from sglang_vericache.cpu import host_pool
from sglang_vericache.pool.sizing import HostTier

GIB = 1 << 30


def switched_on(monkeypatch, free: float, **settings) -> SimpleNamespace:
    monkeypatch.setattr(host_tier, "free_bytes", lambda: int(free * GIB))
    record = SimpleNamespace(
        enable_hierarchical_cache=False, hicache_size=0, hicache_host_memory_fraction=0.8
    )
    host_tier.switch_on(record, VeriCacheConfig(offload="auto", **settings))
    return record


def test_sized_from_what_is_free(monkeypatch):
    record = switched_on(monkeypatch, 64)
    assert record.enable_hierarchical_cache and record.hicache_write_policy == "write_through"
    assert record.hicache_size == 0 and record.hicache_ratio > 1


def test_sized_by_hand(monkeypatch):
    record = switched_on(monkeypatch, 64, host_memory_bytes=3 * GIB)
    assert record.hicache_size * 1e9 == 3 * GIB


@pytest.mark.parametrize("free", [-6.0, 0.1])
def test_too_little_memory_goes_without(monkeypatch, caplog, free):
    """A machine of 8 GiB serves on, and says what is missing."""
    with caplog.at_level(logging.WARNING):
        record = switched_on(monkeypatch, free)
    assert not record.enable_hierarchical_cache
    assert "--vericache-offload is without effect" in caplog.text


def test_what_was_asked_for_and_cannot_be_had(monkeypatch):
    with pytest.raises(VeriCacheConfigError, match=r"12\.0 GiB is more than can be had: 3\.5 GiB"):
        switched_on(monkeypatch, 3.5, host_memory_bytes=12 * GIB)


@pytest.mark.parametrize(("attribute", "flag"), [(a, f) for a, _, f in host_tier.CONTRADICTIONS])
def test_contradictions(attribute, flag):
    """Catches a flag of SGLang's that is silently overruled."""
    record = SimpleNamespace(**{attribute: "something else"})
    with pytest.raises(VeriCacheConfigError, match=f"{flag} something else: leave that flag out"):
        host_tier.switch_on(record, VeriCacheConfig(offload="auto"))


def test_memory_of_this_machine():
    """Catches units that are mixed up: between nothing and a petabyte."""
    assert -(1 << 36) < host_tier.free_bytes() < 1 << 50


def test_rows_are_copied():
    source, target = torch.randn(2, 9, 2, 4), torch.zeros(2, 7, 2, 4)
    a, b = torch.tensor([8, 0, 3]), torch.tensor([1, 6, 2])
    host_pool.copy_rows(list(source), list(target), a, b, page_size=1)
    assert torch.equal(target[:, b], source[:, a])
    assert not target[:, [0, 3, 4, 5]].any()
    with pytest.raises(AssertionError, match="pages of 16"):
        host_pool.copy_rows(list(source), list(target), a, b, page_size=16)


@pytest.mark.parametrize(
    ("lockable", "free", "sentence"),
    [
        (-1, 10.0, r"10\.0 GiB are free\. Give --vericache-host-memory 9216MiB or less\."),
        (2 * GIB, 10.0, r"2\.0 GiB may be locked .*\(ulimit -l\)\. Give .* 1843MiB or less\."),
        (1 << 16, 10.0, r"0\.0 GiB may be locked .*\. Raise that limit, or leave"),
        (-1, -3.0, r"0\.0 GiB are free\. Raise that limit, or leave --vericache-offload out\."),
    ],
)
def test_a_pool_that_cannot_be_pinned(monkeypatch, lockable, free, sentence):
    """Catches a failure of CUDA's that names no flag."""
    monkeypatch.setattr(host_tier, "free_bytes", lambda: int(free * GIB))
    monkeypatch.setattr(host_tier.resource, "getrlimit", lambda which: (lockable, lockable))
    refused = r"^--vericache-offload: the host pool .*\(cudaHostRegister failed\)\. "
    with pytest.raises(VeriCacheConfigError, match=refused + ".*" + sentence):
        with host_tier.making_pool():
            raise RuntimeError("cudaHostRegister failed")


def test_a_pool_smaller_than_a_request(caplog):
    with caplog.at_level(logging.WARNING):
        host_tier.report_room(8192, 8192)
        assert not caplog.text
        host_tier.report_room(8191, 8192)
    assert "holds 8191 tokens, a context may have 8192" in caplog.text


def a_model() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    return model


def test_what_the_draft_pool_goes_by(monkeypatch):
    """Catches tied weights that count twice, and a size that is foreseen anew each time: the draft
    pool could outgrow what was reserved for it."""
    on, off = (SimpleNamespace(enable_hierarchical_cache=value) for value in (True, False))
    given = VeriCacheConfig(offload="auto", host_memory_bytes=GIB)
    assert host_tier.tier_of(on, given, a_model()) == HostTier(GIB, None, 10 * 4 * 4)
    assert host_tier.tier_of(off, given, a_model()) is None
    assert host_tier.tier_of(on, VeriCacheConfig(), a_model()) is None
    host_tier.foreseen_bytes.cache_clear()
    memory = SimpleNamespace(hicache_host_memory_fraction=None, hicache_ratio=3.0)
    monkeypatch.setattr("sglang.srt.runtime_context.get_memory", lambda: memory)
    for free in (5 * GIB, 4 * GIB):
        monkeypatch.setattr(host_tier, "free_bytes", lambda free=free: free)
        tier = host_tier.tier_of(on, VeriCacheConfig(offload="auto"), a_model())
        assert tier == HostTier(5 * GIB, 3.0, 10 * 4 * 4)
    host_tier.foreseen_bytes.cache_clear()
