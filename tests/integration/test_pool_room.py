"""Who is admitted and who goes on: by our hooks, or by SGLang itself where it is patched."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import cpu_engine
import pytest

cpu_engine.required()

from sglang.srt.managers.schedule_batch import ScheduleBatch  # noqa: E402
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache  # noqa: E402

from sglang_vericache.hooks import pool_room  # noqa: E402

PATCHED = hasattr(BasePrefixCache, "may_admit")


class Cache:
    """Answers, and remembers what it was told."""

    rotation = object()

    def __init__(self, admits=True, makes_room=True, decodes=True, on=False) -> None:
        self.admits, self.makes_room, self.decodes = admits, makes_room, decodes
        self.on = on
        self.asked: list = []
        self.shortages: list[int] = []

    def may_admit(self, req, remaining_tokens, growth_tokens, waiting) -> bool:
        self.asked.append((remaining_tokens, growth_tokens, waiting))
        return self.admits

    def looks_on(self) -> bool:
        return self.on

    def on_refusal(self, shortage_tokens) -> bool:
        self.shortages.append(shortage_tokens)
        return self.makes_room

    def may_decode(self, reqs) -> bool:
        self.asked.append([req.rid for req in reqs])
        return self.decodes


REQ = SimpleNamespace(
    rid="r",
    full_untruncated_fill_ids=[0] * 100,
    sampling_params=SimpleNamespace(max_new_tokens=30),
    output_ids=[1, 2],
)


def add(cache, result, admitted=(), preempted=()):
    """What add_one_req says where SGLang's own part says ``result``."""
    adder = SimpleNamespace(
        tree_cache=cache,
        rem_total_tokens=50.0,
        per_req_token_overhead=1,
        can_run_list=list(admitted),
        waiting_queue_len=7,
        preempt_list=list(preempted),
        _add_one_req=lambda *_: result,
    )
    if PATCHED:
        return PrefillAdder.add_one_req(adder, REQ, False, None)
    return pool_room.add_one_req(lambda *_: result, adder, REQ, False, None)


@pytest.mark.parametrize("result", [AddReqResult.CONTINUE, AddReqResult.OTHER])
def test_an_answer_passes(result):
    cache = Cache()
    assert add(cache, result) == result
    assert cache.asked == [(50, 28, 7)] and cache.shortages == []


def test_the_cache_refuses():
    """Catches admission that can never be undone: SGLang is not even asked."""
    assert add(Cache(admits=False), AddReqResult.CONTINUE) == AddReqResult.OTHER


def test_the_cache_refuses_and_looks_on():
    """The scheduler's loop goes on, and SGLang is asked about nobody."""
    cache = Cache(admits=False, on=True)
    assert add(cache, AddReqResult.NO_TOKEN) == AddReqResult.CONTINUE
    assert cache.shortages == []


def test_a_refusal_does_not_close_admission():
    """NO_TOKEN would, until a request leaves; the cache is told what is missing."""
    cache = Cache()
    assert add(cache, AddReqResult.NO_TOKEN) == AddReqResult.OTHER
    assert cache.shortages == [100 + 28 + 1 - 50]


def test_admitted_as_the_last_one():
    """SGLang answers NO_TOKEN for a request that it has admitted, too: nothing is missing."""
    cache = Cache()
    assert add(cache, AddReqResult.NO_TOKEN, [REQ]) == AddReqResult.OTHER
    assert cache.shortages == [0] and cache.asked == [(50, 28, 0)], "this pass has its prefill"


def test_who_had_others_preempted_does_not_wait():
    """Catches a request that is held back after running ones were thrown out for it."""
    cache = Cache()
    add(cache, AddReqResult.CONTINUE, preempted=["other"])
    assert cache.asked == [(50, 28, 0)]


def test_without_rotation_nothing_changes():
    """Catches a server without offloading that tries again and again what cannot fit."""
    cache = Cache(makes_room=False)
    cache.rotation = None
    assert add(cache, AddReqResult.NO_TOKEN) == AddReqResult.NO_TOKEN


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("selected", [None, [2, 0]])
def test_who_goes_on(fits, decodes, selected):
    """Both must be content; the cache is asked about those that are left."""
    cache = Cache(decodes=decodes)
    batch = SimpleNamespace(
        reqs=[SimpleNamespace(rid=name) for name in "abc"],
        tree_cache=cache,
        new_tokens_required_next_decode=lambda indices: 0,
        token_to_kv_pool_allocator=SimpleNamespace(check_decode_capacity=lambda **_: fits),
        spec_algorithm=None,
    )
    if PATCHED:
        found = ScheduleBatch.check_decode_mem(batch, selected)
    else:
        # Another file of this process may have applied the hooks.
        original = inspect.unwrap(ScheduleBatch.check_decode_mem)
        found = pool_room.check_decode_mem(original, batch, selected)
    assert found == (fits and decodes)
    wanted = list("abc") if selected is None else ["c", "a"]
    assert cache.asked == ([wanted] if fits else [])
