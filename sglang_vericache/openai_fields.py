"""The counters of a response in SGLang's extension field of OpenAI responses, ``sglext``."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from typing import Any

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionResponse,
    CompletionResponse,
    SglExt,
)

from sglang_vericache.last_chunk import extend_last_chunk
from sglang_vericache.output_streamer import RESPONSE_FIELD

Records = dict[str, Any] | list[dict[str, Any]]


class VeriCacheExt(SglExt):
    """A record, or a list of them where a request has several choices."""

    vericache: Records | None = None


class VeriCacheChatResponse(ChatCompletionResponse):
    sglext: VeriCacheExt | None = None


class VeriCacheCompletionResponse(CompletionResponse):
    sglext: VeriCacheExt | None = None


_EXTENDED: dict[type, Any] = {
    ChatCompletionResponse: VeriCacheChatResponse,
    CompletionResponse: VeriCacheCompletionResponse,
}


def extend_response(response: Any, results: list[dict[str, Any]]) -> Any:
    """``response`` with the records of ``results``; an error response as it is."""
    kind = _EXTENDED.get(type(response))
    records = _records({i: result["meta_info"] for i, result in enumerate(results)})
    if kind is None or records is None:
        return response
    values = {name: getattr(response, name) for name in type(response).model_fields}
    before = values["sglext"]
    known = {} if before is None else {n: getattr(before, n) for n in SglExt.model_fields}
    extension = VeriCacheExt.model_construct(**known, vericache=records)
    return kind.model_construct(**(values | {"sglext": extension}))


def extend_stream(generate: Any, serving: Any, *args: Any) -> AsyncIterator[str]:
    """The chunks of ``generate(serving, *args)``, with the records in the last one."""
    manager = _RecordingManager(serving.tokenizer_manager)
    serving = copy.copy(serving)
    serving.tokenizer_manager = manager

    def extension() -> dict[str, Any] | None:
        records = _records(manager.meta_infos)
        return None if records is None else {RESPONSE_FIELD: records}

    return extend_last_chunk(generate(serving, *args), extension)


class _RecordingManager:
    """SGLang's tokenizer manager, remembering the last ``meta_info`` of each choice: the code
    that writes the chunks keeps nothing of it."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.meta_infos: dict[int, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_request(self, *args: Any) -> AsyncIterator[dict[str, Any]]:
        async for content in self._manager.generate_request(*args):
            self.meta_infos[content.get("index", 0)] = content["meta_info"]
            yield content


def _records(meta_infos: dict[int, dict[str, Any]]) -> Records | None:
    found = [meta_infos[i].get(RESPONSE_FIELD) for i in sorted(meta_infos)]
    records = [record for record in found if record is not None]
    if not records:
        return None
    return records[0] if len(meta_infos) == 1 else records
