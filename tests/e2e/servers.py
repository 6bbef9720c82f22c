"""Servers under test: the demo's, with SGLang's strictest checks on and a clean log demanded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from client import Client

from sglang_vericache.demo.server import Server

# SGLang's own checks of its memory accounting, as strict as they get.
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
UNWANTED = ("Traceback", "memory leak", "Mem Leak")


@contextmanager
def server(
    model: Path,
    log: Path,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    plugin: bool = True,
    with_gaps: bool = False,
) -> Iterator[Client]:
    """A server that answers; at the end it still lives and its log says nothing unwanted.

    Args:
        plugin: False keeps our plugin from loading at all.
    """
    variables = STRICT | dict(env or {}) | ({} if plugin else {"SGLANG_PLUGINS": "none"})
    with Server(log.stem, model, log, flags, variables) as running:
        client = Client(running.url, with_gaps)
        yield client
        time.sleep(1.5)  # the idle check runs between batches
        client.post("/generate", {"input_ids": [500], "sampling_params": {"max_new_tokens": 1}})
        text = log.read_text(errors="replace")
        for bad in UNWANTED:
            if bad in text:
                at = text.index(bad)
                raise AssertionError(f"{bad!r} in {log}:\n{text[max(0, at - 500) : at + 2500]}")
