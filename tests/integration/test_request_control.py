"""Options of a request on their way: from an OpenAI body to the scheduler, or to a refusal."""

from __future__ import annotations

from types import SimpleNamespace

import cpu_engine
import pytest

cpu_engine.required()

from pydantic import ValidationError  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()

from sglang_vericache import plugin  # noqa: E402

plugin.arm()

from sglang.srt.entrypoints.openai.protocol import (  # noqa: E402
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from sglang_vericache.config import VeriCacheConfig  # noqa: E402
from sglang_vericache.hooks.request_options import check_tokenized  # noqa: E402
from sglang_vericache.request_options import RequestOptionsError  # noqa: E402

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION = {"model": "m", "prompt": "Hello"}
OPTIONS = {"enabled": False, "horizon": 3}


@pytest.mark.parametrize(
    ("kind", "body"), [(ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION)]
)
class TestOpenAI:
    def test_field_reaches_the_sampling_parameters(self, kind, body):
        """Catches a field that pydantic drops, and other custom parameters that it displaces."""
        for params in ({}, {"custom_params": None}, {"custom_params": {"thinking_budget": 5}}):
            request = kind(**body, **params, vericache=OPTIONS)
            wanted = (params.get("custom_params") or {}) | {"vericache": OPTIONS}
            assert request.custom_params == wanted
            if kind is ChatCompletionRequest:
                assert request.to_sampling_params([], {})["custom_params"] == wanted

    def test_custom_params_stay_as_they_are(self, kind, body):
        """Catches a hook that changes requests that do not use it."""
        assert kind(**body).custom_params is None
        assert kind(**body, custom_params={"vericache": OPTIONS}).custom_params == {
            "vericache": OPTIONS
        }

    def test_the_body_is_not_changed(self, kind, body):
        """Catches a second reader of the body who finds it altered."""
        sent = body | {"vericache": OPTIONS, "custom_params": {"a": 1}}
        before = repr(sent)
        kind.model_validate(dict(sent))
        assert repr(sent) == before

    def test_given_twice(self, kind, body):
        """Catches one of two contradicting wishes that is ignored."""
        with pytest.raises(ValidationError, match="vericache is given twice"):
            kind(**body, vericache=OPTIONS, custom_params={"vericache": OPTIONS})

    def test_wrong_values_are_kept_for_the_check(self, kind, body):
        """Catches a wrong type that is dropped on the way."""
        for value in (None, "off", 3, []):
            assert kind(**body, vericache=value).custom_params == {"vericache": value}

    def test_wrong_custom_params(self, kind, body):
        """Catches custom_params of a wrong type that our field papers over."""
        with pytest.raises(ValidationError, match="custom_params"):
            kind(**body, vericache=OPTIONS, custom_params="x")

    def test_deprecated_field_still_works(self, kind, body):
        """Catches a wrapper that forgets what it wraps."""
        with pytest.warns(DeprecationWarning):
            assert kind(**body, data_parallel_rank=1).routed_dp_rank == 1


def test_responses_refuse_the_field():
    """Catches an endpoint that takes the field and does nothing."""
    with pytest.raises(ValidationError, match="not accepted by /v1/responses: use /v1/chat"):
        ResponsesRequest(model="m", input="Hello", vericache=OPTIONS)
    assert ResponsesRequest(model="m", input="Hello").input == "Hello"


def manager(**settings) -> SimpleNamespace:
    config = VeriCacheConfig(**settings)
    return SimpleNamespace(server_args=SimpleNamespace(_vericache=config), context_len=1000)


def tokenized(custom_params, prompt: int = 10) -> SimpleNamespace:
    params = SamplingParams(custom_params=custom_params)
    return SimpleNamespace(sampling_params=params, input_ids=[1] * prompt)


def test_tokenized_requests_are_checked():
    """Catches a check without the server's settings, or of the wrong place."""
    check_tokenized(tokenized(None), manager())
    check_tokenized(tokenized({"vericache": {"horizon": 8, "keep_ratio": 1.0}}), manager(horizon=8))
    with pytest.raises(RequestOptionsError, match="--vericache-horizon"):
        check_tokenized(tokenized({"vericache": {"horizon": 9}}), manager(horizon=8))
    with pytest.raises(RequestOptionsError, match="room for 200"):
        by_ratio = manager(keep_min_tokens=0)
        check_tokenized(tokenized({"vericache": {"keep_ratio": 0.5}}, 500), by_ratio)
    check_tokenized(tokenized({"vericache": {"keep_ratio": 0.5}}, 500), manager())
    embeds = tokenized({"vericache": {"keep_ratio": 0.5}})
    embeds.input_ids = None
    check_tokenized(embeds, manager())


def test_the_hook_is_where_all_requests_pass():
    """Catches a target that SGLang no longer calls for single and batched requests."""
    assert hasattr(TokenizerManager._create_tokenized_object, "__wrapped__")
    for method in (
        TokenizerManager._tokenize_one_request,
        TokenizerManager._batch_tokenize_and_process,
    ):
        assert "_create_tokenized_object" in method.__code__.co_names
