"""A streaming client of many concurrent requests that notes when tokens arrive."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.serving.figures import Stream

# Most streams get their tokens some at a time, so that neither client nor server is busy with
# events: tens of thousands of tokens a second would be thousands of events, each of which costs the
# server's front a good part of a millisecond. A few get each as it comes, for the times between
# tokens.
INTERVAL, WATCHED = 32, 8
# For a whole answer, and until something comes.
TIMEOUT_S, SILENCE_S = 600, 120
READ_BYTES = 1 << 20
# Of a closed loop: before its counted time, when every client has begun, and after it, so that
# tokens which were under way at its end are counted by their share.
WARM_S, AFTER_S = 1.0, 1.0


class AnswerError(RuntimeError):
    """The server answered with something else than the tokens that were asked for."""


@dataclass
class Answer:
    """One request.

    Attributes:
        watched: each of its tokens was sent as it came.
        complete: it ended by itself.
        counters: the plugin's, of a complete answer; None of an unmodified server.
    """

    started: float
    watched: bool
    events: list[tuple[float, int]] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    complete: bool = False
    counters: dict[str, Any] | None = None

    @property
    def stream(self) -> Stream:
        return Stream(self.started, tuple(self.events))


@dataclass(frozen=True)
class ClosedLoop:
    """Requests of which each that ends is replaced at once.

    Attributes:
        start: of the counted time.
        end: of the counted time.
    """

    answers: list[Answer]
    start: float
    end: float

    @property
    def complete(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.complete]

    @property
    def inside(self) -> list[Answer]:
        """What was sent in the counted time, as far as it was answered.

        Up to now, not to the end of that time: that would leave slow first tokens out, and the
        others run on meanwhile.
        """
        return [a for a in self.answers if self.start <= a.started <= self.end and a.events]

    @property
    def running(self) -> float:
        """How many requests were past their first token, on average over the counted time."""
        total = 0.0
        for answer in self.answers:
            if answer.events:
                ended = answer.stream.ended if answer.complete else self.end
                began = max(answer.events[0][0], self.start)
                total += max(0.0, min(ended, self.end) - began)
        return total / (self.end - self.start)


class StreamingClient:
    """Greedy requests of exact lengths.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def fixed_set(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        """All prompts in one request, ``tokens`` tokens each; their time counts from sending it.

        SGLang's front reads such a batch whole and hands it to the scheduler in one message, so
        that cached prompts begin together. Prompts of their own requests begin one after the
        other: to read 256 of 7.7K tokens takes longer than short answers last. (While generation
        is paused the front holds requests back, and then hands them on one by one.)
        """
        count = len(prompts)
        body = _body(prompts[0], tokens, 1) if count == 1 else _batch_body(prompts, tokens)

        async def run() -> list[Answer]:
            async with self._session() as session:
                now = time.perf_counter()
                answers = [Answer(now, _interval(i) == 1) for i in range(count)]
                await self._receive(session, body, answers)
                return answers

        return _of_length(asyncio.run(run()), tokens)

    def queue(self, prompts: Sequence[Sequence[int]], tokens: int, at_once: int) -> list[Answer]:
        """All prompts released together, at most ``at_once`` of them sent at a time; their time
        counts from the release."""
        bodies = [_body(prompt, tokens, _interval(i)) for i, prompt in enumerate(prompts)]

        async def run() -> list[Answer]:
            gate = asyncio.Semaphore(at_once)

            async def admitted(session: aiohttp.ClientSession, i: int, body: bytes) -> Answer:
                async with gate:
                    return await self._stream(session, body, i)

            async with self._session() as session:
                tasks = [admitted(session, i, body) for i, body in enumerate(bodies)]
                released = time.perf_counter()
                answers = list(await asyncio.gather(*tasks))
            for answer in answers:
                answer.started = released
            return answers

        return _of_length(asyncio.run(run()), tokens)

    def closed_loop(
        self, prompts: Sequence[Sequence[int]], tokens: int, seconds: float
    ) -> ClosedLoop:
        """As many clients as prompts: each sends its prompt again once its answer is complete.

        The first answers are of unequal lengths, so that they do not all end at once later. What
        counts are ``seconds`` from WARM_S after every client has its first token. Whoever calls
        this aborts what still runs then.
        """
        count = len(prompts)
        full = [_body(prompt, tokens, _interval(i)) for i, prompt in enumerate(prompts)]
        firsts = [
            _body(prompt, max(tokens * (i + 1) // count, 1), _interval(i))
            for i, prompt in enumerate(prompts)
        ]
        answers: list[Answer] = []

        async def slot(session: aiohttp.ClientSession, i: int) -> None:
            body = firsts[i]
            while True:
                await self._stream(session, body, i, answers)
                body = full[i]

        async def run() -> float:
            async with self._session() as session:
                tasks = [asyncio.create_task(slot(session, i)) for i in range(count)]
                begun = asyncio.create_task(_all_begun(answers, count))
                try:
                    await asyncio.wait([begun, *tasks], return_when=asyncio.FIRST_COMPLETED)
                    start = time.perf_counter() + WARM_S
                    lasts = WARM_S + seconds + AFTER_S
                    # A client only ends by an error.
                    await asyncio.wait(tasks, timeout=lasts, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (begun, *tasks):
                        task.cancel()
                    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                for outcome in outcomes:
                    if not isinstance(outcome, asyncio.CancelledError):
                        raise AnswerError(f"a request failed: {outcome!r}")
                return start

        start = asyncio.run(run())
        return ClosedLoop(answers, start, start + seconds)

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S, sock_read=SILENCE_S),
            read_bufsize=READ_BYTES,
        )

    async def _stream(
        self,
        session: aiohttp.ClientSession,
        body: bytes,
        place: int,
        into: list[Answer] | None = None,
    ) -> Answer:
        answer = Answer(time.perf_counter(), _interval(place) == 1)
        if into is not None:
            into.append(answer)
        await self._receive(session, body, [answer])
        return answer

    async def _receive(
        self, session: aiohttp.ClientSession, body: bytes, answers: Sequence[Answer]
    ) -> None:
        """Events of a batch say which of its prompts they are of."""
        headers = {"Content-Type": "application/json"}
        async with session.post(self.url + "/generate", data=body, headers=headers) as response:
            if response.status != 200:
                raise AnswerError(f"status {response.status}: {(await response.text())[:500]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now, event = time.perf_counter(), json.loads(line[6:])
                    _take(answers[event.get("index", 0)], event, now)
        for answer in answers:
            answer.complete = True


def _of_length(answers: list[Answer], tokens: int) -> list[Answer]:
    for answer in answers:
        if len(answer.output) != tokens:
            raise AnswerError(f"{len(answer.output)} tokens instead of {tokens}")
    return answers


def _take(answer: Answer, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        raise AnswerError(str(event["error"]))
    meta, ids = event["meta_info"], event["output_ids"]
    count = meta["completion_tokens"]
    # By default SGLang sends all tokens so far, with --incremental-streaming-output the new ones.
    answer.output = ids if len(ids) == count else answer.output + ids
    if count > (answer.events[-1][1] if answer.events else 0):
        answer.events.append((now, count))
    answer.counters = meta.get("vericache") or answer.counters


async def _all_begun(answers: Sequence[Answer], count: int) -> None:
    while len(answers) < count or not all(answer.events for answer in answers[:count]):
        await asyncio.sleep(0.005)


def _interval(place: int) -> int:
    return 1 if place < WATCHED else INTERVAL


def _body(prompt: Sequence[int], tokens: int, interval: int) -> bytes:
    parameters = _parameters(tokens, interval)
    asked = {"input_ids": list(prompt), "sampling_params": parameters, "stream": True}
    return json.dumps(asked).encode()


def _batch_body(prompts: Sequence[Sequence[int]], tokens: int) -> bytes:
    parameters = [_parameters(tokens, _interval(i)) for i in range(len(prompts))]
    ids = [list(prompt) for prompt in prompts]
    return json.dumps({"input_ids": ids, "sampling_params": parameters, "stream": True}).encode()


def _parameters(tokens: int, interval: int) -> dict[str, Any]:
    return {
        "temperature": 0,
        "max_new_tokens": tokens,
        "ignore_eos": True,
        "stream_interval": interval,
    }
