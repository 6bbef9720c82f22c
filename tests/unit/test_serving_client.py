"""The streaming client against a server that answers as SGLang does."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

aiohttp = pytest.importorskip("aiohttp")
from aiohttp import web  # noqa: E402

from benchmarks.serving import client  # noqa: E402
from benchmarks.serving.client import (  # noqa: E402
    INTERVAL,
    WATCHED,
    Answer,
    AnswerError,
    ClosedLoop,
    StreamingClient,
)

COUNTERS = {"rounds": 3, "accepted": 6}


class FakeServer:
    """Streams ``prompt[0] + n`` as n-th token, ``chunk`` tokens at a time; of a batch the last
    prompt first."""

    def __init__(self, chunk: int = 5, incremental: bool = False, missing: int = 0) -> None:
        self.chunk, self.incremental, self.missing = chunk, incremental, missing
        self.bodies: list[dict] = []
        self.now = self.most_at_once = 0

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            return await self.answer(request)
        finally:
            self.now -= 1

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        ids, parameters = body["input_ids"], body["sampling_params"]
        batch = isinstance(ids[0], list)
        prompts, parameters = (ids, parameters) if batch else ([ids], [parameters])
        wanted = parameters[0]["max_new_tokens"] - self.missing
        response = web.StreamResponse()
        await response.prepare(request)
        for at in range(0, wanted, self.chunk):
            end = min(at + self.chunk, wanted)
            for i, prompt in reversed(list(enumerate(prompts))):
                event = self.event(prompt, at if self.incremental else 0, end, end == wanted)
                event |= {"index": i} if batch else {}
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await asyncio.sleep(0.001)
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    def event(prompt: list[int], begin: int, end: int, last: bool) -> dict:
        meta = {"completion_tokens": end, **({"vericache": COUNTERS} if last else {})}
        return {"output_ids": [prompt[0] + n for n in range(begin, end)], "meta_info": meta}

    @contextmanager
    def running(self) -> Iterator[str]:
        loop, runner, url = asyncio.new_event_loop(), None, []
        ready = threading.Event()

        async def start():
            app = web.Application()
            app.add_routes([web.post("/generate", self.generate)])
            nonlocal runner
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            url.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
            ready.set()

        def serve():
            asyncio.set_event_loop(loop)
            loop.run_until_complete(start())
            loop.run_forever()
            loop.run_until_complete(runner.cleanup())

        thread = threading.Thread(target=serve)
        thread.start()
        assert ready.wait(10)
        try:
            yield url[0]
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)


@pytest.mark.parametrize("incremental", [False, True])
def test_fixed_set(incremental):
    """Catches outputs that are put together wrongly, answers in another order, and requests that
    begin one after the other."""
    server = FakeServer(incremental=incremental)
    prompts = [[1000 * i, 1, 2] for i in range(WATCHED + 2)]
    with server.running() as url:
        answers = StreamingClient(url).fixed_set(prompts, 23)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.output == [prompt[0] + n for n in range(23)]
        assert [count for _, count in answer.events] == [5, 10, 15, 20, 23]
        assert answer.counters == COUNTERS and answer.complete
        assert answer.stream.ended > answer.started
    (body,) = server.bodies
    intervals = [parameters["stream_interval"] for parameters in body["sampling_params"]]
    assert intervals == [1] * WATCHED + [INTERVAL] * 2
    assert [a.watched for a in answers] == [True] * WATCHED + [False] * 2
    assert all(parameters["ignore_eos"] for parameters in body["sampling_params"])


def test_a_lone_request():
    """Catches a batch of one, which is not what users send."""
    server = FakeServer()
    with server.running() as url:
        (answer,) = StreamingClient(url).fixed_set([[7, 1]], 23)
    assert answer.output == [7 + n for n in range(23)] and answer.watched
    assert server.bodies[0]["input_ids"] == [7, 1]
    assert server.bodies[0]["sampling_params"]["stream_interval"] == 1


@pytest.mark.parametrize("count", [1, 2])
def test_short_answers_are_refused(count):
    """Catches a rate over fewer tokens than were asked for."""
    with FakeServer(missing=1).running() as url, pytest.raises(AnswerError, match="22 tokens"):
        StreamingClient(url).fixed_set([[1]] * count, 23)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(client, "WARM_S", 0.2)
    monkeypatch.setattr(client, "AFTER_S", 0.6)  # longer than a busy machine pauses


def test_closed_loop(quick):
    """Catches a request that is not replaced, and ones that go on after the end."""
    server = FakeServer()
    with server.running() as url:
        loop = StreamingClient(url).closed_loop([[0], [100], [200]], 20, seconds=0.3)
    assert len(loop.complete) > 6
    assert loop.end - loop.start == pytest.approx(0.3)
    first_tokens = [a.events[0][0] for a in loop.answers[:3]]
    assert loop.start >= max(first_tokens) + 0.2
    # Tokens that were under way at the end are known.
    assert max(a.stream.ended for a in loop.answers) > loop.end
    assert 1.0 < loop.running <= 3.0
    inside = loop.inside
    assert 0 < len(inside) < len(loop.answers)
    assert all(loop.start <= a.started <= loop.end for a in inside)
    # The first ones are of unequal lengths, the others whole.
    lengths = [b["sampling_params"]["max_new_tokens"] for b in server.bodies]
    assert sorted(lengths[:3]) == [6, 13, 20] and set(lengths[3:]) == {20}
    firsts = {b["input_ids"][0] for b in server.bodies[3:]}
    assert firsts == {0, 100, 200}


def test_what_was_sent_in_the_counted_time():
    """Catches first tokens that came late and are left out, and what was never answered."""
    late, unanswered = Answer(5.9, True, [(6.5, 1)]), Answer(5.9, True)
    before, after = Answer(1.9, True, [(2.5, 1)]), Answer(6.1, True, [(6.5, 1)])
    assert ClosedLoop([before, late, unanswered, after], 2.0, 6.0).inside == [late]


def test_how_many_run():
    """Catches requests that wait for memory and count as running."""
    whole = Answer(0.0, True, [(1.0, 1), (3.0, 9)], complete=True)
    cut_off, waiting = Answer(0.0, True, [(5.0, 1), (5.5, 4)]), Answer(0.0, True)
    assert ClosedLoop([whole, cut_off, waiting], 2.0, 6.0).running == pytest.approx((1 + 1) / 4)


def test_closed_loop_of_a_broken_server():
    """Catches a loop that waits for its end although nobody answers."""
    with pytest.raises(AnswerError, match="failed"):
        StreamingClient("http://127.0.0.1:9").closed_loop([[1]], 20, seconds=0.1)


@pytest.mark.parametrize("at_once", [1, 3])
def test_queue(at_once):
    """Catches more requests sent than allowed, and times that begin when a request is sent."""
    server = FakeServer()
    prompts = [[1000 * i] for i in range(5)]
    with server.running() as url:
        answers = StreamingClient(url).queue(prompts, 10, at_once)
    assert [a.output[0] for a in answers] == [0, 1000, 2000, 3000, 4000]
    assert len({a.started for a in answers}) == 1
    assert server.most_at_once == at_once
