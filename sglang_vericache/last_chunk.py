"""A field in the last chunk of a server-sent-event stream of JSON. Pure.

A chunk of its own would be simpler, but it would have no choices, and clients that look at the
first choice of every chunk would stumble over it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

_DATA, _DONE = "data: ", "data: [DONE]"


async def extend_last_chunk(
    chunks: AsyncGenerator[str], extension: Callable[[], dict[str, Any] | None]
) -> AsyncIterator[str]:
    """``chunks``, the last one before [DONE] with ``extension()`` merged into its ``sglext``.

    A chunk that ends a choice or has none is held back until the next one comes, as it may be the
    last; all others pass at once.

    Args:
        extension: asked when the stream has ended; None leaves it as it is.
    """
    held: str | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            if held is not None:
                done = chunk.startswith(_DONE)
                yield _extend(held, extension()) if done else held
                held = None
            if _may_be_last(chunk):
                held = chunk
            else:
                yield chunk
    if held is not None:
        yield held


def _may_be_last(chunk: str) -> bool:
    """Quotes inside of texts are escaped in JSON, so these are keys."""
    ends = '"finish_reason":"' in chunk or '"choices":[]' in chunk
    return ends and chunk.startswith(_DATA)


def _extend(chunk: str, extension: dict[str, Any] | None) -> str:
    if extension is None:
        return chunk
    values = json.loads(chunk.removeprefix(_DATA))
    values["sglext"] = (values.get("sglext") or {}) | extension
    return f"{_DATA}{json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"
