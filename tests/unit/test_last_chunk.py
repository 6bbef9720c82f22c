"""A field in the last chunk of a stream, without holding back the others."""

from __future__ import annotations

import asyncio
import json

import pytest

from sglang_vericache.last_chunk import extend_last_chunk

DONE = "data: [DONE]\n\n"


def chunk(text: str = "", finish: str | None = None, **more) -> str:
    values = {"id": "1", "choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}
    return "data: " + json.dumps(values, separators=(",", ":")) + "\n\n"


def tail(**more) -> str:
    return "data: " + json.dumps({"id": "1", "choices": [], **more}, separators=(",", ":")) + "\n\n"


def run(*chunks: str, extension: dict | None = None) -> list[str]:
    async def source():
        for item in chunks:
            yield item

    async def collect():
        extended = extend_last_chunk(source(), lambda: extension)
        return [item async for item in extended]

    return asyncio.run(collect())


def parsed(item: str) -> dict:
    return json.loads(item.removeprefix("data: "))


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk("a"), chunk("b", "stop")],
        [chunk("a"), chunk("", "length"), tail(usage={"total_tokens": 3})],
        [chunk("", "stop")],
        [chunk("", "stop"), chunk("", "length")],
    ],
    ids=["finish", "usage", "only-one", "two-choices"],
)
def test_the_last_chunk_gets_the_field(chunks):
    """Catches a chunk more or fewer, or the field in another than the last."""
    found = run(*chunks, DONE, extension={"vericache": {"rounds": 2}})
    assert len(found) == len(chunks) + 1
    assert found[-1] == DONE
    assert found[:-2] == chunks[:-1]
    assert parsed(found[-2]) == parsed(chunks[-1]) | {"sglext": {"vericache": {"rounds": 2}}}


def test_other_fields_of_the_extension_stay():
    """Catches SGLang's own extension fields that ours displaces."""
    last = tail(sglext={"cached_tokens_details": {"device": 3}})
    found = run(chunk("a", "stop"), last, DONE, extension={"vericache": {}})
    assert parsed(found[1])["sglext"] == {"cached_tokens_details": {"device": 3}, "vericache": {}}


def test_without_a_record():
    """Catches a stream that changes for a request without counters."""
    chunks = [chunk("a"), chunk("", "stop"), DONE]
    assert run(*chunks) == chunks


@pytest.mark.parametrize(
    "chunks",
    [
        ['data: {"error":{"message":"x"}}\n\n', DONE],
        [chunk("a"), 'event: sglext_ids\ndata: {"choices":[]}\n\n', DONE],
        [DONE],
        [],
        [chunk("a", "stop")],
    ],
    ids=["error", "named-event", "done", "nothing", "cut-off"],
)
def test_streams_that_end_otherwise(chunks):
    """Catches chunks that are lost, or rewritten although they are none of ours."""
    assert run(*chunks, extension={"vericache": {}}) == chunks


def test_text_that_looks_like_a_key():
    """Catches an answer with JSON in it that is held back."""
    passed = []

    async def source():
        for text in ('{"finish_reason":"stop"}', '"choices":[]', "end"):
            yield chunk(text)
            passed.append(text)
        yield DONE

    async def collect():
        async for item in extend_last_chunk(source(), dict):
            if item != DONE:
                # The source has not been asked for the next chunk yet.
                assert len(passed) < 3 and parsed(item)["choices"][0]["text"] not in passed

    asyncio.run(collect())


def test_closing_reaches_the_source():
    """Catches a client that goes away while SGLang goes on generating for it."""
    closed = []

    async def source():
        try:
            while True:
                yield chunk("a")
        finally:
            closed.append(True)

    async def leave():
        stream = extend_last_chunk(source(), dict)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert closed


def test_errors_pass():
    """Catches a refused request that becomes an empty stream."""

    async def source():
        raise ValueError("refused")
        yield ""

    async def first():
        await anext(extend_last_chunk(source(), dict))

    with pytest.raises(ValueError, match="refused"):
        asyncio.run(first())
