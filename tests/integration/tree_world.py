"""SGLang's own pools, radix cache and host tier on the CPU, without a model or a scheduler.

Each KV row says which token of which text it is, so that what is read can be checked.
"""

from __future__ import annotations

import json
import random
from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InitLoadBackParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import SpawnRanks, get_context, publish
from sglang.srt.server_args import prepare_server_args
from test_bad_input import DENSE

from sglang_vericache.cpu import host_pool
from sglang_vericache.loader.checksums import Checksums
from sglang_vericache.loader.client import LoaderClient
from sglang_vericache.loader.copy import PlainCopier
from sglang_vericache.tree.cache import VeriRadixCache
from sglang_vericache.tree.integrity import Integrity
from sglang_vericache.tree.residency import Residency

LAYERS, HEADS, DIM, ROWS, WIDTH = 2, 1, 4, 24, 600


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory) -> None:
    """SGLang's settings of this process, for each file that imports it."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(DENSE))
    flags = ["--device", "cpu", "--skip-tokenizer-init", "--log-level", "error"]
    record = prepare_server_args(["--model-path", str(folder), *flags])
    publish(record, role="scheduler", ranks=SpawnRanks(world_rank=0))
    get_context().override(
        "test",
        enable_hierarchical_cache=True,
        hicache_io_backend="direct",
        hicache_mem_layout="layer_first",
        hicache_write_policy="write_through",
    )


def stamp(text: list[int]) -> torch.Tensor:
    """``[n]`` what the KV of each token says: a digest of the text up to there."""
    digest, marks = 17, []
    for token in text:
        digest = (digest * 31 + token) % 16_777_213
        marks.append(digest)
    return torch.tensor(marks, dtype=torch.float32)


class World:
    """
    Args:
        device, host: tokens of the two pools.
        core: "rust" or "python".
        checks: with checksums of what is on the host.
    """

    def __init__(
        self, device: int, host: int, core: str = "rust", copier=PlainCopier, checks: bool = False
    ) -> None:
        get_context().override("test", hicache_size=0, hicache_ratio=host / device)
        host_pool.supply()
        self.pool = MHATokenToKVPool(
            device, 1, torch.float32, HEADS, DIM, LAYERS, "cpu", enable_memory_saver=False
        )
        self.allocator = TokenToKVPoolAllocator(
            device, torch.float32, "cpu", self.pool, need_sort=False
        )
        self.rows = ReqToTokenPool(ROWS, WIDTH, "cpu", enable_memory_saver=False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
            tree_components=(ComponentType.FULL,),
            tree_core_backend=core,
        )
        self.cache = VeriRadixCache(params)
        self.cache.init_hicache(SimpleNamespace(file_storage_path=None), params)
        self._host_pool = self.cache.cache_controller.mem_pool_host
        self.host_free = self._host_pool.available_size()
        pool = self._host_pool.anchor_entry.host_pool
        layers = (
            [*pool.k_data_refs, *pool.v_data_refs],
            [*self.pool.k_buffer, *self.pool.v_buffer],
        )
        self.host_layers = layers[0]
        checksums = Checksums(*layers) if checks else None
        checked = {"checksums": checksums} if checks else {}
        self.copier = copier(*layers, **checked)
        self.loader = LoaderClient(self.copier, PlainCopier(*layers, **checked))
        integrity = Integrity(checksums, self.recompute) if checks else None
        self.residency = Residency(self.cache, self.rows.req_to_token, self.loader, integrity)
        self.cache.rotation = SimpleNamespace(
            residency=self.residency, poll=self.residency.settle_arrived
        )
        self.requests: list = []
        self._made = 0
        self.rng = random.Random(0)
        self.step = 0

    def close(self) -> None:
        self.residency.close()

    # A request's life, as the scheduler drives it.

    def admit(self, text: list[int]):
        """Match, allocate, "compute", checkpoint; None when the pool has no room."""
        self._made += 1
        req = Request(f"r{self._made}", text)
        match = self.match(req)
        if match.host_hit_length and not self.bring_in(req, match):
            return None
        prefix = self.cache.path_device_indices(req.last_node)
        lock = self.cache.lock(req.last_node)
        self.cache.ready_to_load_host_cache()  # for every prefill that runs
        self.residency.wait_for_prefill([req.last_node])
        slots = self.take(len(text) - len(prefix))
        if slots is None:
            self.cache.unlock(lock)
            return None
        req.lock = lock
        self.rows.alloc([req])
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        row[: len(prefix)] = prefix
        row[len(prefix) : len(text)] = slots
        self.residency.mend([req])
        self.write(slots, stamp(text)[len(prefix) :])
        req.kv.cache_protected_len = req.kv.cache_inserted_len = len(prefix)
        req.kv.kv_committed_len = req.kv.kv_allocated_len = len(text)
        self.check_row(req)
        self.cache.checkpoint(req, up_to=len(text))
        self.events()
        self.requests.append(req)
        self.residency.seat_of(req)
        return req

    def match(self, req):
        key = RadixKey(req.origin_input_ids[:-1], None)
        match = self.cache.match_prefix(MatchPrefixParams(key=key, req=req))
        req.last_node, req.best_match_node = match.last_device_node, match.best_match_node
        req.host_hit_length = match.host_hit_length
        return match

    def bring_in(self, req, match) -> bool:
        """SGLang's own load of what a prompt matches on the host. False when the prefill is put
        off after all: the load stays queued then, for a later one to start."""
        _, req.last_node = self.cache.init_load_back(
            InitLoadBackParams(match.best_match_node, match.host_hit_length, req=req)
        )
        return self.rng.random() < 0.7

    def take(self, count: int):
        missing = count - self.allocator.available_size()
        if missing > 0:
            self.cache.evict_for_alloc(EvictParams(num_tokens=missing))
        return self.allocator.alloc(count)

    def generate(self, req, count: int) -> bool:
        """A verify pass: reads everything, and appends."""
        assert self.residency.is_full(req)
        self.check_row(req)
        slots = self.take(count)
        if slots is None:
            return False
        known = len(req.text)
        req.output_ids.extend((known * 7 + i * 3) % 50 for i in range(count))
        self.write(slots, stamp(req.text)[known:])
        self.rows.req_to_token[req.kv.req_pool_idx, known : known + count] = slots
        req.kv.kv_committed_len = req.kv.kv_allocated_len = known + count
        return True

    def end(self, req, checkpoint: bool) -> None:
        self.requests.remove(req)
        req.ended = checkpoint
        release_kv_cache(req, self.cache, checkpoint=checkpoint)

    def events(self) -> None:
        self.cache.check_hicache_events()

    def arrive(self, timeout_s: float = 0.0) -> list:
        self.step += 1
        return self.residency.arrive(timeout_s)

    def corrupt(self, host_row: int, layer: int = 0, bit: int = 4) -> None:
        """One bit of one token on the host."""
        self.host_layers[layer][host_row].view(torch.uint8)[0, 2] ^= 1 << bit

    def host_rows(self, node: int) -> torch.Tensor:
        """Where a node lies on the host."""
        return self.cache.tree_core.build_storage_backup_spec(node, False).host_value

    def recompute(self, req, start: int, rows) -> None:
        """A prefill in the middle of a request: reads what is before, and writes ``rows``."""
        end = start + len(rows)
        slots = self.rows.req_to_token[req.kv.req_pool_idx, :end].long()
        assert torch.equal(slots[start:], rows), "the row names other slots"
        marks = stamp(req.text)[:end]
        for layer in range(LAYERS):
            before = (marks[:start, None, None] + layer).expand(-1, 1, DIM)
            assert torch.equal(self.pool.k_buffer[layer][slots[:start]], before)
        self.write(rows, marks[start:])

    # What must hold.

    def write(self, slots, marks) -> None:
        for layer in range(LAYERS):
            self.pool.k_buffer[layer][slots] = marks[:, None, None] + layer
            self.pool.v_buffer[layer][slots] = marks[:, None, None] + layer + 0.5

    def check_row(self, req) -> None:
        """The row names slots that hold the KV of the request's very text."""
        text = req.text
        slots = self.rows.req_to_token[req.kv.req_pool_idx, : len(text)].long()
        assert (slots > 0).all(), "the padding slot in a full row"
        marks = stamp(text)[:, None, None]
        for layer in range(LAYERS):
            assert torch.equal(self.pool.k_buffer[layer][slots], (marks + layer).expand(-1, 1, DIM))
            assert torch.equal(
                self.pool.v_buffer[layer][slots], (marks + layer + 0.5).expand(-1, 1, DIM)
            )

    def check_ledger(self) -> None:
        private = sum(r.kv.kv_allocated_len - r.kv.cache_protected_len for r in self.requests)
        found = (
            self.allocator.available_size()
            + self.cache.evictable_size()
            + self.cache.protected_size()
            + private
        )
        assert found == self.allocator.size, (found, self.allocator.size)
        for req in self.requests:
            row = self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.cache_protected_len]
            assert (row > 0).all() if self.residency.is_full(req) else (row == 0).all()

    def settle(self) -> None:
        """Let everything that is under way arrive, in both directions."""
        self.cache.ready_to_load_host_cache()
        self.residency.wait_for_prefill([])
        for _ in range(200):
            self.arrive(0.01)
            self.events()
            if not self.loader.under_way and not self.cache.ongoing_write_through:
                break

    def check_idle(self) -> None:
        """Nothing runs: nothing is locked, on either tier."""
        assert not self.requests
        self.settle()
        self.check_ledger()
        assert self.cache.protected_size() == 0 and not self.cache.ongoing_load_back
        device = self.cache.evictable_size()
        self.cache.evict_for_alloc(EvictParams(num_tokens=device))
        assert self.cache.evictable_size() == 0, "a device lock is left"
        self.cache.evict_host(10**6)
        assert self.host_free == self._host_pool.available_size(), "a host lock is left"


class Request:
    """The part of SGLang's Req that the cache looks at."""

    priority = session_id = extra_key = cache_salt = kv_rotation_base = session = None
    skip_radix_cache_insert = False
    lock = last_node = None
    prefix_len = 0
    swa_host_hit_length = mamba_host_hit_length = 0

    def __init__(self, rid: str, text: list[int]) -> None:
        self.rid = rid
        self.origin_input_ids = array("q", text)
        self.output_ids = array("q")
        self.full_untruncated_fill_ids = array("q", text)
        self.kv = ReqKvInfo()
        self.sampling_params = SimpleNamespace(max_new_tokens=1 << 30)
        self.ended = False

    @property
    def text(self) -> list[int]:
        return [*self.origin_input_ids, *self.output_ids]

    def finished(self) -> bool:
        return self.ended

    def refresh_fill_ids(self) -> None:
        self.full_untruncated_fill_ids = array("q", self.text)

    def owned_kv_len(self) -> int:
        return self.kv.kv_committed_len


def text(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50) for _ in range(count)]


def away(world, req) -> None:
    """Detach a request and take what it left on the device."""
    seat = world.residency.seat_of(req)
    assert world.residency.is_complete(seat)
    world.residency.detach(seat, world.step)
    world.check_ledger()


def back(world, req) -> None:
    """Order its path, and wait for it."""
    assert world.residency.order(world.residency.seat_of(req))
    for _ in range(200):
        world.check_ledger()
        if world.residency.is_full(req):
            return
        world.arrive(0.05)
    raise AssertionError("it never came")
