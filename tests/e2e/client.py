"""Sending calls to a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from cases import Answer, Answers, Call, Phase

TIMEOUT_S = 600


class Client:
    """One server.

    Args:
        with_gaps: ask for the two best log-probabilities of each token, to tell ties from
            mismatches; for the reference only, where it changes nothing else.
    """

    def __init__(self, url: str, with_gaps: bool = False) -> None:
        self.url, self.with_gaps = url, with_gaps

    def run(self, phases: Callable[[Answers], Iterable[Phase]], base: Answers) -> Answers:
        """All phases in order.

        Args:
            phases: yields the phases; later ones may be made from the reference's answers.
            base: the reference's answers; when this is the reference, pass the same dict that
                the phases read and it fills as they go.
        """
        answers: Answers = base if self.with_gaps else {}
        for phase in phases(base):
            if phase.flush_before:
                self.flush()
            for answer in self._phase(phase):
                if answer.name in answers:
                    raise ValueError(f"two calls are named {answer.name}")
                answers[answer.name] = answer
        return answers

    def _phase(self, phase: Phase) -> list[Answer]:
        with ThreadPoolExecutor(phase.concurrency + 1) as pool:
            companions = []
            if phase.companion is not None:
                begun = threading.Event()
                companions = [pool.submit(self._stream, phase.companion, begun)]
                if not begun.wait(TIMEOUT_S):
                    raise AssertionError(f"{phase.companion.name}: no first token")
            with ThreadPoolExecutor(phase.concurrency) as calls:
                answers = list(calls.map(self.call, phase.calls))
            return [*(future.result() for future in companions), *answers]

    def call(self, call: Call) -> Answer:
        body = call.body()
        if self.with_gaps:
            body |= {"stream": False, "return_logprob": True, "top_logprobs_num": 2}
        if body.get("stream"):
            return self._stream(call)
        return self._answer(call.name, self.post("/generate", body))

    def _stream(self, call: Call, begun: threading.Event | None = None) -> Answer:
        last, sizes, seen = None, [], 0
        body = call.body()
        if self.with_gaps:
            body |= {"return_logprob": True, "top_logprobs_num": 2}
        for last in self.chunks(body):
            if begun is not None:
                begun.set()
            total = last["meta_info"]["completion_tokens"]
            sizes.append(total - seen)
            seen = total
        answer = self._answer(call.name, last)
        answer.chunks = sizes
        return answer

    def chunks(self, body: dict[str, Any]) -> Iterable[dict[str, Any]]:
        with requests.post(
            self.url + "/generate", json=body | {"stream": True}, stream=True, timeout=TIMEOUT_S
        ) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield json.loads(line[len(b"data: ") :])

    def _answer(self, name: str, reply: Any) -> Answer:
        reply = reply[0] if isinstance(reply, list) else reply
        meta = reply["meta_info"]
        answer = Answer(
            name=name,
            ids=reply["output_ids"],
            text=reply["text"],
            finish=meta["finish_reason"],
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            info=meta.get("vericache"),
        )
        answer.logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or []]
        for best in meta.get("output_top_logprobs") or []:
            answer.gaps.append(best[0][0] - best[1][0] if best and len(best) > 1 else 0.0)
        return answer

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        response = requests.post(self.url + path, json=body, timeout=TIMEOUT_S)
        if response.status_code != 200:
            raise AssertionError(f"{path} answered {response.status_code}: {response.text}")
        return response.json()

    def flush(self) -> None:
        # An answered request may stay in the running batch for one more step.
        response = requests.post(self.url + "/flush_cache?timeout=30", timeout=TIMEOUT_S)
        response.raise_for_status()

    def info(self) -> dict[str, Any]:
        response = requests.get(self.url + "/server_info", timeout=TIMEOUT_S)
        response.raise_for_status()
        return response.json()

    def status(self) -> dict[str, Any]:
        return self.info()["internal_states"][0]["vericache"]
