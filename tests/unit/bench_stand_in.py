"""Answers as a server of SGLang does, as far as the bench command asks: run in its place.

Tokens come at a fixed pace, four at a time with the plugin. DIES_AT names a prompt length at which
the server is gone in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from aiohttp import web

PLUGIN = os.environ.get("SGLANG_PLUGINS") != "none"
CHUNK, PACE_S = (4, 0.006) if PLUGIN else (1, 0.002)
DIES_AT = int(os.environ.get("STAND_IN_DIES_AT", "0"))
STATUS = {
    "phase_seconds": {"draft": 0.0},
    "horizons": {"chosen": {"0": 5, "4": 66}, "current": 4},
    "rounds_in_parts": 1,
    "plain_together": 2,
    "simulated_acceptance": ", ".join(os.environ.get("VERICACHE_REPLAY", "").split(":")) or None,
}


def meta(count: int, wanted: int) -> dict:
    found: dict = {"completion_tokens": count}
    if PLUGIN and count == wanted:
        found["vericache"] = {"rounds": wanted // CHUNK, "accepted": wanted - wanted // CHUNK}
    return found


async def generate(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    ids, parameters = body["input_ids"], body["sampling_params"]
    batch = isinstance(ids[0], list)
    one = parameters[0] if isinstance(parameters, list) else parameters
    prompts, wanted = ids if batch else [ids], one["max_new_tokens"]
    if not body.get("stream"):
        answer = {"output_ids": list(range(wanted)), "meta_info": meta(wanted, wanted)}
        return web.json_response([answer] * len(prompts))
    response = web.StreamResponse()
    await response.prepare(request)
    for at in range(1, wanted + CHUNK, CHUNK):
        count = min(at, wanted)
        event = {"output_ids": list(range(count)), "meta_info": meta(count, wanted)}
        for i in range(len(prompts)):
            place = {"index": i} if batch else {}
            await response.write(f"data: {json.dumps(event | place)}\n\n".encode())
        await asyncio.sleep(PACE_S)
        if len(prompts[0]) == DIES_AT:
            print("MemoryError: no room for a stand-in", flush=True)
            os._exit(1)
    await response.write(b"data: [DONE]\n\n")
    return response


async def done(_: web.Request) -> web.Response:
    return web.json_response({})


async def info(_: web.Request) -> web.Response:
    return web.json_response({"internal_states": [{"vericache": STATUS} if PLUGIN else {}]})


app = web.Application(client_max_size=1 << 30)
app.add_routes(
    [
        web.post("/generate", generate),
        web.get("/v1/models", done),
        web.post("/flush_cache", done),
        web.post("/abort_request", done),
        web.get("/server_info", info),
    ]
)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
