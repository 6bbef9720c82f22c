"""Patch 0014: a plugin's values in OpenAI responses, written by SGLang's endpoints."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import patched_sglang
import pytest

patched_sglang.required()

from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()

from sglang_vericache import plugin  # noqa: E402

plugin.arm()

from sglang.srt.entrypoints.openai import serving_chat, serving_completions  # noqa: E402
from sglang.srt.entrypoints.openai.protocol import (  # noqa: E402
    ChatCompletionRequest,
    CompletionRequest,
)

CHAT = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "Hello"}])
COMPLETION = CompletionRequest(model="m", prompt="Hello")


class Off:
    """Settings of a server that sets none."""

    def __getattr__(self, name: str):
        return None


class Manager:
    model_path = "m"
    server_args = Off()
    tokenizer = None

    def __init__(self, contents: list[dict]) -> None:
        self.contents = contents

    async def generate_request(self, adapted, raw):
        for content in self.contents:
            yield content


def content(index: int, record: dict | None) -> dict:
    info = {"id": "1", "prompt_tokens": 1, "completion_tokens": 1, "weight_version": "1"}
    info["finish_reason"] = {"type": "length", "length": 1}
    info |= {"vericache": record} if record else {}
    return {"index": index, "text": "a", "output_ids": [1], "meta_info": info}


@pytest.fixture(params=["chat", "completion"])
def endpoint(request, monkeypatch):
    """Functions that answer at once and in a stream: choices -> JSON that a client gets."""
    chat = request.param == "chat"
    module = serving_chat if chat else serving_completions
    monkeypatch.setattr(module, "get_serving", lambda: Off())
    kind = module.OpenAIServingChat if chat else module.OpenAIServingCompletion
    body, name = (CHAT, "chat") if chat else (COMPLETION, "completion")

    def serving(contents):
        made = object.__new__(kind)
        made.__dict__.update(
            tokenizer_manager=Manager(contents),
            template_manager=Off(),
            reasoning_parser=None,
            tool_call_parser=None,
            chat_encoding_spec=None,
            _encoding_adapter=None,
        )
        return made, body.model_copy(update={"n": len(contents)})

    def at_once(contents):
        made, sent = serving(contents)
        return getattr(made, f"_build_{name}_response")(sent, contents, 0).model_dump()

    def stream(contents):
        made, sent = serving(contents)

        async def collect():
            chunks = getattr(made, f"_generate_{name}_stream")(SimpleNamespace(), sent, None)
            return [chunk async for chunk in chunks]

        lines = asyncio.run(collect())
        assert lines[-1] == "data: [DONE]\n\n"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    return SimpleNamespace(at_once=at_once, stream=stream)


RECORDS = [{"rounds": 2}, {"rounds": 3}]


@pytest.mark.parametrize(
    ("records", "shown"),
    [([None], None), (RECORDS[:1], RECORDS[0]), (RECORDS, RECORDS)],
    ids=["none", "one", "several"],
)
def test_values_are_shown(endpoint, records, shown):
    """Catches values that one of the two forms of an answer loses, and empty extensions."""
    contents = [content(i, record) for i, record in enumerate(records)]
    answer = endpoint.at_once(contents)
    chunks = [chunk["sglext"] for chunk in endpoint.stream(contents) if "sglext" in chunk]
    if shown is None:
        assert "sglext" not in answer and not chunks
    else:
        assert answer["sglext"]["vericache"] == shown and chunks == [{"vericache": shown}]
