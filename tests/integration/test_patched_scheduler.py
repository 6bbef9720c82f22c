"""Patches 0004 to 0006, 0008 and 0009: what happens around the forwards."""

from __future__ import annotations

import json
from array import array
from types import SimpleNamespace

import patched_sglang
import pytest
import torch

patched_sglang.required()

from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()

from sglang.srt.managers.io_struct import RequestLevelInfo  # noqa: E402
from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.managers.scheduler import Scheduler  # noqa: E402
from sglang.srt.managers.scheduler_components import output_streamer  # noqa: E402
from sglang.srt.managers.scheduler_components.batch_result_processor import (  # noqa: E402
    SchedulerBatchResultProcessor,
)
from sglang.srt.managers.scheduler_components.internal_state import (  # noqa: E402
    SchedulerInternalStateController,
)
from sglang.srt.managers.tokenizer_manager import (  # noqa: E402
    TokenizerManager,
    _slice_streaming_output_meta_info,
)
from sglang.srt.managers.utils import GenerationBatchResult  # noqa: E402
from sglang.srt.mem_cache import allocation_sizing  # noqa: E402
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator  # noqa: E402
from sglang.srt.model_executor import pool_configurator  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, get_context, publish  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402
from test_bad_input import DENSE  # noqa: E402

from sglang_vericache.algorithm import VeriCacheAlgorithm  # noqa: E402
from sglang_vericache.metrics import RowBytes  # noqa: E402
from sglang_vericache.output_streamer import (  # noqa: E402
    RESPONSE_FIELD,
    VeriCacheOutputStreamer,
)

OURS = VeriCacheAlgorithm("VERICACHE", lambda server_args: object)
BUILTIN = SpeculativeAlgorithm.EAGLE


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(DENSE))
    flags = ["--device", "cpu", "--skip-tokenizer-init", "--log-level", "error"]
    # Without our flag: it would apply the hooks of patches that are missing.
    record = prepare_server_args(["--model-path", str(model), *flags])
    return publish(record, role="scheduler", ranks=SpawnRanks(world_rank=0))


@pytest.mark.parametrize("draft_tokens", [4, 17, 64])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("overlap", [False, True], ids=["synchronous", "overlap"])
def test_a_row_holds_the_reserve(config, monkeypatch, draft_tokens, page_size, overlap):
    """Catches a request near the context limit whose reserve ends in the next one's row."""
    get_context().override(
        "test",
        disable_overlap_schedule=not overlap,
        page_size=page_size,
        speculative_algorithm=BUILTIN.name,
        speculative_num_steps=draft_tokens - 1,
    )
    monkeypatch.setattr(allocation_sizing, "max_speculative_num_draft_tokens", lambda: draft_tokens)
    reserve = allocation_sizing.get_alloc_reserve_per_decode()
    assert reserve == draft_tokens * (2 if overlap else 1)
    context = 1024
    width = context + allocation_sizing.get_req_to_token_extra_context_len()
    req = SimpleNamespace(kv=SimpleNamespace(kv_allocated_len=0, kv_committed_len=context))
    (_, (end,), _) = allocation_sizing.page_aligned_decode_alloc_lens(
        [req], reserve=reserve, page_size=page_size
    )
    assert end <= width


class Unread:
    """Output ids that nobody may look at."""

    def __getitem__(self, key):
        raise AssertionError("a step without new tokens looked at old ones")


def test_a_step_without_tokens_looks_at_nothing():
    req = SimpleNamespace(finished=lambda: False, to_finish=None, output_ids=Unread())
    Req.update_finish_state(req, 0)
    req.to_finish = "aborted"
    Req.update_finish_state(req, 0)
    assert (req.finished_reason, req.to_finish) == ("aborted", None)


def request(**changes):
    req = SimpleNamespace(
        rid="r",
        is_retracted=False,
        finished=lambda: False,
        grammar=None,
        kv=SimpleNamespace(kv_committed_len=10),
        spec_verify_ct=0,
        spec_num_correct_drafts=0,
        spec_correct_drafts_histogram=[],
    )
    req.update_spec_correct_drafts_histogram = lambda count: (
        Req.update_spec_correct_drafts_histogram(req, count)
    )
    vars(req).update(changes)
    return req


class Processor:
    """The parts of the result processor that a step's tokens pass."""

    def __init__(self) -> None:
        self.metrics_reporter = SimpleNamespace(snapshot_spec_decode_metrics=lambda *args: None)
        self.model_worker = SimpleNamespace(on_verify_complete_cpu=lambda *args, **kwargs: None)

    def advance_grammar_fsm(self, result, batch):
        SchedulerBatchResultProcessor.advance_grammar_fsm(self, result, batch)

    def _accept_grammar_tokens(self, req, tokens):
        return SchedulerBatchResultProcessor._accept_grammar_tokens(self, req, tokens)

    def resolve(self, result, batch):
        return SchedulerBatchResultProcessor._resolve_spec_v2_tokens(self, result, batch)


def step(accept_lens, width=3) -> GenerationBatchResult:
    count = len(accept_lens)
    return GenerationBatchResult(
        next_token_ids=torch.arange(count * width),
        accept_lens=torch.tensor(accept_lens),
        speculative_num_draft_tokens=width,
    )


def batch_of(*reqs, algorithm=OURS):
    return SimpleNamespace(
        reqs=list(reqs),
        has_grammar=any(req.grammar is not None for req in reqs),
        forward_mode=SimpleNamespace(is_decode=lambda: True, is_extend=lambda: False),
        spec_algorithm=algorithm,
    )


def test_a_step_that_accepts_nothing_is_not_counted():
    """Catches an IndexError in the histogram, and averages over steps without a verification."""
    drafting, verified = request(), request()
    result = step([0, 3])
    assert Processor().resolve(result, batch_of(drafting, verified)) == [[], [3, 4, 5]]
    assert (drafting.spec_verify_ct, drafting.spec_num_correct_drafts) == (0, 0)
    assert drafting.spec_correct_drafts_histogram == []
    assert (verified.spec_verify_ct, verified.spec_num_correct_drafts) == (1, 2)
    assert verified.spec_correct_drafts_histogram == [0, 0, 1]
    assert (drafting.kv.kv_committed_len, verified.kv.kv_committed_len) == (10, 13)
    assert (result.num_accepting_reqs, result.num_correct_drafts) == (1, 2)
    assert result.get_num_generated_tokens(2) == 3


def accumulator(**changes):
    return output_streamer._GenerationStreamAccumulator(
        return_logprob=False,
        return_hidden_states=False,
        return_routed_experts=False,
        return_indexer_topk=False,
        spec_algorithm=OURS,
        disaggregation_mode=None,
        default_stream_interval=1,
        default_force_stream_interval=50,
        get_cached_tokens_details=lambda req: None,
        is_request_level_customized_info_key=lambda key: key == "about",
        current_weight_version=None,
        **changes,
    )


def streamed(output_ids, sent: int, **changes):
    req = SimpleNamespace(
        **{
            "rid": "r",
            "beam_group": None,
            "finished": lambda: False,
            "finished_reason": None,
            "finished_len": None,
            "finished_output": False,
            "stream": True,
            "sampling_params": SimpleNamespace(
                stream_interval=None,
                skip_special_tokens=True,
                spaces_between_special_tokens=True,
                no_stop_trim=False,
            ),
            "output_ids": array("q", output_ids),
            "output_ids_through_stop": array("q", output_ids),
            "origin_input_ids": [1],
            "send_token_offset": sent,
            "send_output_token_logprobs_offset": 0,
            "send_decode_id_offset": 0,
            "http_worker_ipc": None,
            "decoded_text": "",
            "customized_info": None,
            "check_match_stop_str_prefix": lambda: False,
            "init_incremental_detokenize": lambda: ([], 0),
            "get_mm_token_counts": lambda: (0, 0, 0),
            **dict.fromkeys(("reasoning_tokens", "cached_tokens", "retraction_count"), 0),
            **dict.fromkeys(("weight_version_events", "time_stats", "spec_verify_ct")),
            **dict.fromkeys(("spec_num_correct_drafts", "spec_num_block_accept_tokens")),
            **dict.fromkeys(("spec_num_cap_tokens", "spec_correct_drafts_histogram")),
            "spec_cap_lens_histogram": None,
            **changes,
        }
    )
    req.num_unsent_tokens = Req.num_unsent_tokens.fget(req)
    return req


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("length", "sent"), [(50, 50), (3, 5), (0, 0)])
def test_nothing_new_is_not_sent(stream, length, sent):
    """Catches chunks without tokens, and an offset that goes back after a restart."""
    sink = accumulator()
    req = streamed(range(length), sent, stream=stream)
    sink.accept(req=req)
    assert sink.rids == [] and req.send_token_offset == sent


def test_new_tokens_are_sent():
    sink = accumulator()
    sink.accept(req=streamed(range(5), 3))
    sink.accept(req=streamed(range(1), 0))
    assert [list(ids) for ids in sink.output_ids] == [[3, 4], [0]]


def test_request_level_info_goes_with_the_first_and_the_last_chunk():
    """Catches a value that the last chunk of a stream lacks."""
    sink = accumulator()
    ending = {
        "finished": lambda: True,
        "finished_reason": SimpleNamespace(to_json=dict),
        "weight_version_events": [],
    }
    for sent, changes in ((0, {}), (2, {}), (2, ending)):
        sink.accept(req=streamed(range(4), sent, customized_info={"about": [7]}, **changes))
    assert sink.customized_info["about"] == [RequestLevelInfo([7]), None, RequestLevelInfo([7])]


def state():
    return SimpleNamespace(
        customized_info_accumulated={},
        customized_info_reported_keys=set(),
        request_level_info={},
    )


class Manager:
    _accumulate_request_meta_info = staticmethod(TokenizerManager._accumulate_request_meta_info)


def update(current, item) -> dict:
    meta_info: dict = {}
    TokenizerManager.update_request_meta_info(Manager(), meta_info, current, {"key": [item]}, 0, {})
    return meta_info


def test_request_level_info_is_one_value():
    """Catches a list of one, values that add up, and slicing by tokens."""
    current = state()
    assert update(current, None) == {}
    assert update(current, RequestLevelInfo({"rounds": 1})) == {"key": {"rounds": 1}}
    last = update(current, RequestLevelInfo({"rounds": 2}))
    assert last == {"key": {"rounds": 2}} and current.request_level_info == last
    _slice_streaming_output_meta_info(last, 5, current.customized_info_accumulated.keys())
    assert last == {"key": {"rounds": 2}}


def test_token_level_info_still_adds_up():
    current = state()
    assert update(current, [1]) == {"key": [1]}
    assert update(current, [2, 3]) == {"key": [1, 2, 3]}


def test_coalesced_chunks_keep_it():
    """Catches a value that is lost because another chunk came right after it."""
    chunks = [
        {"output_ids": [1], "meta_info": {"key": 4}},
        {"output_ids": [2], "meta_info": {"other": 5}},
    ]
    out = TokenizerManager._coalesce_streaming_chunks(None, chunks, "r", (), ("key",))
    assert out == {"output_ids": [1, 2], "meta_info": {"key": 4, "other": 5}}


def test_the_algorithm_chooses_the_streamer():
    for algorithm in (BUILTIN, SpeculativeAlgorithm.NONE):
        scheduler = SimpleNamespace(spec_algorithm=algorithm, draft_worker=None)
        chosen = Scheduler.get_output_streamer_class(scheduler)
        assert chosen is output_streamer.SchedulerOutputStreamer


def test_our_streamer_marks_its_values():
    """Catches a streamer that does not know the pools of the server it streams for."""
    worker = SimpleNamespace(row_bytes=RowBytes(2, 8))
    scheduler = SimpleNamespace(spec_algorithm=OURS, draft_worker=worker)
    kind = Scheduler.get_output_streamer_class(scheduler)
    assert issubclass(kind, VeriCacheOutputStreamer)
    streamer = object.__new__(kind)
    running, finished = request(), request(finished=lambda: True)
    info = streamer.build_additional_customized_info([running, finished])
    assert info[RESPONSE_FIELD][0] is None
    assert info[RESPONSE_FIELD][1].value["rounds"] == 0


def test_the_worker_contributes_to_the_internal_state():
    class Worker(BaseSpecWorker):
        def get_internal_state(self):
            return {"mine": 1}

    shown: dict = {}
    controller = SimpleNamespace(
        scheduler=SimpleNamespace(spec_algorithm=OURS, draft_worker=Worker()),
        _average_accept_length=lambda: None,
    )
    SchedulerInternalStateController._add_speculative(controller, shown)
    assert shown == {"mine": 1}


class Grammar:
    def __init__(self) -> None:
        self.accepted: list[int] = []

    def accept_token(self, token: int) -> None:
        self.accepted.append(token)

    def is_terminated(self) -> bool:
        return len(self.accepted) >= 1


@pytest.mark.parametrize(("algorithm", "before"), [(OURS, []), (BUILTIN, [0])], ids=str)
def test_the_grammar_order(algorithm, before):
    """Catches a request that ends a token early because its grammar went ahead."""
    req = request(grammar=Grammar())
    result = step([1])
    tokens = Processor().resolve(result, batch_of(req, algorithm=algorithm))
    assert tokens == [[0]] and req.grammar.accepted == before


def test_a_run_is_still_cut_where_the_grammar_ends():
    req = request(grammar=Grammar())
    assert Processor().resolve(step([3]), batch_of(req, algorithm=BUILTIN)) == [[0]]


@pytest.mark.parametrize(("draft", "left"), [(False, 70), (True, 100)], ids=["target", "draft"])
def test_the_worker_takes_its_share_of_the_budget(config, monkeypatch, draft, left):
    """Catches a target pool that leaves the worker nothing, and a share that is taken twice."""
    seen = []
    sizes = SimpleNamespace(max_total_num_tokens=5)

    class Sizer:
        def calculate_pool_sizes(self, budget, page_size):
            seen.append(budget)
            return sizes

    monkeypatch.setattr(pool_configurator, "create_memory_pool_configurator", lambda c: Sizer())
    taker = SimpleNamespace(get_worker_pool_bytes=lambda configurator, budget: 30)
    configurator = SimpleNamespace(
        is_draft_worker=draft,
        spec_algorithm=taker,
        _apply_token_constraints=lambda tokens: tokens,
    )
    assert KVCacheConfigurator.config_from_budget(configurator, 100) is sizes
    assert seen == [left]
    assert BUILTIN.get_worker_pool_bytes(configurator, 100) == 0
