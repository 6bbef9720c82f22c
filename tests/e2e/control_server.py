"""A server of ours with its control endpoint at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import openai
import requests
from breadth import ANY_END, BY_RATIO, tokens
from cases import Call
from client import Client
from servers import server

from sglang_vericache.metrics import DraftCounters


class ControlledServer:
    """
    Attributes:
        log: its output, at level info.
    """

    def __init__(self, client: Client, log: Path) -> None:
        self.client, self.log, self.url = client, log, client.url

    def generate(self, call: Call, options: dict | None = None, flush: bool = True) -> dict:
        """The whole reply; on an empty cache unless told otherwise."""
        if flush:
            self.client.flush()
        body = call.body()
        if options is not None:
            body["sampling_params"]["custom_params"] = {"vericache": options}
        return self.client.post("/generate", body)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)

    def status(self) -> dict:
        response = requests.get(self.url + "/vericache", timeout=60)
        response.raise_for_status()
        return response.json()

    def switch(self, on: bool) -> dict:
        return self.client.post("/vericache", {"drafting": on})


@contextmanager
def controlled(
    model: Path, log: Path, flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[ControlledServer]:
    flags = (*flags, "--enable-vericache", *BY_RATIO, "--log-level", "info")
    with server(model, log, flags, environment) as client:
        yield ControlledServer(client, log)


def call(length: int, count: int = 60) -> Call:
    return Call(f"control/{length}", tokens(300 + length, length), count, ANY_END)


def info(reply: dict) -> DraftCounters:
    return DraftCounters.parse(reply["meta_info"]["vericache"])
