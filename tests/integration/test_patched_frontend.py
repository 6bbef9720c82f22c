"""Patches 0010 to 0014: requests, responses, metrics and routes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import patched_sglang
import pytest

patched_sglang.required()

from fastapi import FastAPI  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from sglang.srt.plugins import add_http_routes, load_plugins  # noqa: E402

load_plugins()

from sglang_vericache import plugin  # noqa: E402

plugin.arm()

from sglang.srt.entrypoints import http_server  # noqa: E402
from sglang.srt.entrypoints.openai.protocol import (  # noqa: E402
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
    SglExt,
    register_sglext_key,
    registered_sglext,
)
from sglang.srt.managers import tokenizer_manager  # noqa: E402
from sglang.srt.managers.scheduler import Scheduler  # noqa: E402
from sglang.srt.managers.scheduler_components.internal_state import (  # noqa: E402
    SchedulerInternalStateController,
    UpdateRejected,
)
from sglang.srt.managers.scheduler_components.metrics_reporter import (  # noqa: E402
    SchedulerMetricsReporter,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402

from sglang_vericache.config import VeriCacheConfig  # noqa: E402
from sglang_vericache.hooks.internal_state import SWITCH, update_handlers  # noqa: E402
from sglang_vericache.metrics_reporter import VeriCacheMetricsReporter  # noqa: E402
from sglang_vericache.request_options import RequestOptionsError  # noqa: E402

OURS = SpeculativeAlgorithm.from_string("VERICACHE")
BUILTIN = SpeculativeAlgorithm.EAGLE
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION = {"model": "m", "prompt": "Hello"}
OPTIONS = {"enabled": False, "horizon": 3}
RECORD = {"rounds": 2, "drafted": 10, "accepted": 5, "tokens_per_round": 3.5}


@pytest.mark.parametrize(
    ("kind", "body"), [(ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION)]
)
def test_a_declared_field_goes_along(kind, body):
    """Catches a field that is dropped, displaces others, or contradicts itself unnoticed."""
    for params in ({}, {"custom_params": None}, {"custom_params": {"thinking_budget": 5}}):
        wanted = (params.get("custom_params") or {}) | {"vericache": OPTIONS}
        assert kind(**body, **params, vericache=OPTIONS).custom_params == wanted
    assert kind(**body).custom_params is None
    with pytest.raises(ValidationError, match="vericache is given twice"):
        kind(**body, vericache=OPTIONS, custom_params={"vericache": OPTIONS})
    with pytest.raises(ValidationError, match="custom_params"):
        kind(**body, vericache=OPTIONS, custom_params="x")


def test_an_endpoint_without_custom_params_refuses():
    with pytest.raises(ValidationError, match="vericache is not accepted by this endpoint"):
        ResponsesRequest(model="m", input="Hello", vericache=OPTIONS)
    assert ResponsesRequest(model="m", input="Hello").input == "Hello"


class Accepted(Exception):
    """A request got past the checks."""


def accept(**values):
    raise Accepted


@pytest.mark.parametrize("algorithm", ["VERICACHE", "EAGLE", None])
def test_requests_are_validated_by_the_algorithm(monkeypatch, algorithm):
    """Catches a check that is not called, or called where the algorithm is another."""
    monkeypatch.setattr(
        tokenizer_manager, "get_spec", lambda: SimpleNamespace(speculative_algorithm=algorithm)
    )
    options = {"custom_params": {"vericache": {"horizon": 9}}, "max_new_tokens": 1}
    request = tokenizer_manager.GenerateReqInput(input_ids=[1] * 10, sampling_params=options)
    config = VeriCacheConfig(horizon=8)
    manager = SimpleNamespace(
        preferred_sampling_params=None,
        sampling_params_class=SamplingParams,
        tokenizer=None,
        model_config=SimpleNamespace(vocab_size=100),
        server_args=SimpleNamespace(_vericache=config),
        context_len=1000,
        tokenized_generate_req_type=accept,
    )
    monkeypatch.setattr(tokenizer_manager, "_validate_watermark_request", lambda params: None)
    monkeypatch.setattr(
        tokenizer_manager,
        "get_disagg",
        lambda: SimpleNamespace(disaggregation_transfer_backend=None),
    )
    ours = algorithm == "VERICACHE"
    with pytest.raises(RequestOptionsError if ours else Accepted):
        TokenizerManager._create_tokenized_object(manager, request, "", [1] * 10)


def test_the_algorithm_chooses_the_reporter():
    assert OURS.get_metrics_reporter_class() is VeriCacheMetricsReporter
    assert BUILTIN.get_metrics_reporter_class() is SchedulerMetricsReporter
    assert SpeculativeAlgorithm.NONE.get_metrics_reporter_class() is SchedulerMetricsReporter
    made = {}
    scheduler = SimpleNamespace(
        spec_algorithm=SimpleNamespace(
            get_metrics_reporter_class=lambda: lambda **given: made.update(given) or "reporter"
        ),
        metrics_collector_context=1,
        metrics_collector=2,
    )
    Scheduler.init_metrics_reporter(scheduler)
    assert scheduler.metrics_reporter == "reporter" and made["metrics_collector"] == 2


@pytest.mark.parametrize(
    ("algorithm", "proposed", "length"), [("VERICACHE", 10, 3.5), ("EAGLE", 14, 10.0)]
)
def test_the_algorithm_corrects_what_responses_say(monkeypatch, algorithm, proposed, length):
    """Catches plain tokens and short rounds in the acceptance of a response."""
    spec = SimpleNamespace(speculative_algorithm=algorithm, speculative_num_draft_tokens=8)
    monkeypatch.setattr(tokenizer_manager, "get_spec", lambda: spec)
    monkeypatch.setattr(tokenizer_manager, "_ragged_verify_cap_accept", lambda: False)
    chunk = SimpleNamespace(
        spec_verify_ct=[2],
        spec_num_correct_drafts=[5],
        completion_tokens=[20],
        spec_correct_drafts_histogram=None,
    )
    shown = {"vericache": RECORD}
    TokenizerManager._calculate_spec_decoding_metrics(None, shown, chunk, 0)
    assert shown["spec_num_proposed_drafts"] == proposed
    assert shown["spec_accept_length"] == length
    assert shown["spec_accept_rate"] == 5 / proposed


def test_the_worker_handles_updates():
    """Catches handlers that are lost, and a server without speculation that stumbles."""

    class Worker(BaseSpecWorker):
        drafting = True

        def get_update_handlers(self):
            return update_handlers(self)

        def switch_drafting(self, on: bool) -> None:
            self.drafting = on

    worker = Worker()
    controller = SchedulerInternalStateController(SimpleNamespace(draft_worker=worker), False)
    handler = controller._update_handlers()[SWITCH]
    with pytest.raises(UpdateRejected):
        handler.validate(SWITCH, 2)
    handler.validate(SWITCH, 0)
    assert handler.apply(SWITCH, 0) is None and worker.drafting is False
    assert BaseSpecWorker.get_update_handlers(worker) == {}
    idle = SchedulerInternalStateController(SimpleNamespace(draft_worker=None), False)
    assert SWITCH not in idle._update_handlers()


def test_routes_are_added_where_http_is_served(monkeypatch):
    """Catches routes that are missing in one of the two kinds of processes."""
    app = FastAPI()
    add_http_routes(app)
    add_http_routes(app)
    assert len([route for route in app.routes if getattr(route, "path", "") == "/vericache"]) == 2

    seen = []

    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    monkeypatch.setattr(http_server, "add_http_routes", seen.append)
    monkeypatch.setattr(http_server, "load_plugins", lambda: seen.append("plugins"))
    monkeypatch.setattr(http_server, "init_multi_tokenizer", stop)
    monkeypatch.setattr(http_server, "set_global_state", stop)
    with pytest.raises(Stop):
        asyncio.run(http_server.lifespan(app).__aenter__())
    assert seen == ["plugins", app]
    with pytest.raises(Stop):
        http_server._setup_and_run_http_server(None, None, None, None, [None], None)
    assert seen[2:] == [http_server.app]


def test_declared_keys_in_the_extension():
    """Catches values of other choices that are lost, and an extension where there is nothing."""
    assert registered_sglext([{"id": "1"}]) == {}
    assert registered_sglext([{"vericache": RECORD}]) == {"vericache": RECORD}
    several = [{"vericache": {"rounds": i}} for i in range(2)]
    assert registered_sglext(several) == {"vericache": [{"rounds": 0}, {"rounds": 1}]}
    with pytest.raises(ValueError, match="field of SGLang"):
        register_sglext_key("input_ids")
    extension = SglExt(input_ids=[1], vericache=RECORD)
    assert extension.model_dump() == {"input_ids": [1], "vericache": RECORD}
    others, ids = extension.split_ids()
    assert others.model_dump() == {"vericache": RECORD} and ids.model_dump() == {"input_ids": [1]}
