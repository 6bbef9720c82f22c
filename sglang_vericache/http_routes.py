"""GET and POST /vericache."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sglang.srt.entrypoints.http_server import get_global_state
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_vericache.hooks.internal_state import SWITCH
from sglang_vericache.nearest import unknown

PATH = "/vericache"
_BODY = '{"drafting": true} or {"drafting": false}'


def add_routes(app: FastAPI) -> None:
    """Once an app; SGLang's own middleware guards them by their auth level."""
    if all(getattr(route, "path", None) != PATH for route in app.routes):
        app.add_api_route(PATH, get_status, methods=["GET"])
        app.add_api_route(PATH, post_switch, methods=["POST"])


async def get_status() -> Any:
    """Settings with their sources, pool, spans, counters; one record a scheduler."""
    states = await get_global_state().tokenizer_manager.get_internal_state()
    records = [state["vericache"] for state in states]
    return records[0] if len(records) == 1 else records


@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def post_switch(request: Request) -> Any:
    """Switch drafting on or off; running requests follow from their next step on."""
    try:
        body = await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return _refusal(f"The body is not JSON: accepted is {_BODY}.")
    if not isinstance(body, dict):
        return _refusal(f"The body is not an object: accepted is {_BODY}.")
    for key in body:
        if key != "drafting":
            return _refusal(unknown("Key", key, ["drafting"]))
    if not isinstance(body.get("drafting"), bool):
        return _refusal(f"drafting is {json.dumps(body.get('drafting'))}: accepted is {_BODY}.")
    update = SetInternalStateReq(server_args={SWITCH: int(body["drafting"])})
    if not all(await get_global_state().tokenizer_manager.set_internal_state(update)):
        return JSONResponse({"error": "The scheduler refused: see its log."}, status_code=500)
    return await get_status()


def _refusal(sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=400)
