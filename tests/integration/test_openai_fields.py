"""The record in SGLang's OpenAI responses, as they are serialised."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import cpu_engine
import pytest

cpu_engine.required()

from fastapi.encoders import jsonable_encoder  # noqa: E402
from sglang.srt.entrypoints.openai.protocol import (  # noqa: E402
    ChatCompletionResponse,
    CompletionResponse,
    SglExt,
    UsageInfo,
)

from sglang_vericache.openai_fields import extend_response, extend_stream  # noqa: E402

RECORD = {"rounds": 2, "plain": {"end_of_output": 1}, "tokens_per_round": None}
KINDS = [ChatCompletionResponse, CompletionResponse]


def response(kind, **more):
    return kind(id="1", model="m", choices=[], usage=UsageInfo(total_tokens=3), **more)


def result(record=RECORD) -> dict:
    return {"meta_info": {"id": "1", **({"vericache": record} if record else {})}}


@pytest.mark.parametrize("kind", KINDS)
class TestResponse:
    def test_record_is_serialised(self, kind):
        """Catches a field that the parent's schema drops, and others that change with it."""
        plain = response(kind)
        extended = extend_response(plain, [result()])
        assert isinstance(extended, kind)
        for shown in (jsonable_encoder(extended), json.loads(extended.model_dump_json())):
            assert shown == jsonable_encoder(plain) | {"sglext": {"vericache": RECORD}}

    def test_other_extension_fields_stay(self, kind):
        """Catches SGLang's own fields that ours displaces."""
        before = SglExt(input_ids=[1, 2], spec_tokens_details={"spec_verify_ct": 4})
        shown = jsonable_encoder(extend_response(response(kind, sglext=before), [result()]))
        assert shown["sglext"] == jsonable_encoder(before) | {"vericache": RECORD}

    def test_several_choices(self, kind):
        """Catches records of other choices that are lost."""
        extended = extend_response(response(kind), [result({"rounds": i}) for i in range(3)])
        shown = jsonable_encoder(extended)["sglext"]["vericache"]
        assert shown == [{"rounds": 0}, {"rounds": 1}, {"rounds": 2}]

    def test_no_record(self, kind):
        """Catches an empty extension where there is nothing to say."""
        plain = response(kind)
        assert extend_response(plain, [result(None)]) is plain


def test_errors_stay():
    """Catches an error response that is taken for an answer."""
    error = SimpleNamespace(status_code=500)
    assert extend_response(error, [result()]) is error


class Serving:
    """An endpoint whose stream writes a chunk for each content, as SGLang's do."""

    def __init__(self, contents: list[dict]) -> None:
        self.contents, self.tokenizer_manager, self.other = contents, self, "kept"

    async def generate_request(self, adapted, raw):
        assert (adapted, raw) == ("adapted", "raw")
        for content in self.contents:
            yield content

    async def stream(self, adapted, request, raw):
        assert self.other == "kept"
        async for content in self.tokenizer_manager.generate_request(adapted, raw):
            finish = content["meta_info"].get("finish")
            yield f'data: {{"choices":[{{"finish_reason":{json.dumps(finish)}}}]}}\n\n'
        yield "data: [DONE]\n\n"


def chunks_of(serving: Serving) -> list[str]:
    async def collect():
        stream = extend_stream(Serving.stream, serving, "adapted", "request", "raw")
        return [chunk async for chunk in stream]

    return asyncio.run(collect())


def content(index: int, finish: str | None = None, **meta) -> dict:
    return {"index": index, "meta_info": {"finish": finish, **meta}}


def test_stream():
    """Catches a record of an earlier chunk, and a serving object that stays changed."""
    serving = Serving([content(0), content(0), content(0, "stop", vericache=RECORD)])
    chunks = chunks_of(serving)
    assert json.loads(chunks[2][6:])["sglext"] == {"vericache": RECORD}
    assert "sglext" not in "".join(chunks[:2] + chunks[3:])
    assert serving.tokenizer_manager is serving


def test_stream_of_several_choices():
    """Catches choices that finish in another order."""
    serving = Serving(
        [
            content(0),
            content(1, "stop", vericache={"rounds": 1}),
            content(0, "stop", vericache={"rounds": 0}),
        ]
    )
    chunks = chunks_of(serving)
    assert json.loads(chunks[2][6:])["sglext"]["vericache"] == [{"rounds": 0}, {"rounds": 1}]
    assert len(chunks) == 4 and "sglext" not in chunks[1]


def test_stream_without_index():
    """Catches native contents of a single choice, which carry no index."""
    serving = Serving([{"meta_info": {"finish": "stop", "vericache": RECORD}}])
    assert '"rounds":2' in chunks_of(serving)[0]
