"""GET and POST /vericache behind SGLang's own key rules."""

from __future__ import annotations

from types import SimpleNamespace

import cpu_engine
import pytest

cpu_engine.required()

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from sglang.srt.managers.io_struct import SetInternalStateReq  # noqa: E402
from sglang.srt.managers.scheduler_components.internal_state import (  # noqa: E402
    SchedulerInternalStateController,
    UpdateRejected,
)
from sglang.srt.utils.auth import add_api_key_middleware  # noqa: E402

from sglang_vericache import http_routes  # noqa: E402
from sglang_vericache.hooks.internal_state import SWITCH, add_switch, add_vericache  # noqa: E402


class Worker:
    drafting = True

    def switch_drafting(self, on: bool) -> None:
        assert isinstance(on, bool)
        self.drafting = on

    def get_internal_state(self) -> dict:
        return {"vericache": self.status()}

    def status(self) -> dict:
        return {"drafting": self.drafting, "config": {"horizon": 16}}


class Manager:
    """The tokenizer manager's side, wired to a worker without a scheduler between."""

    def __init__(self, worker) -> None:
        self.controller = SimpleNamespace(scheduler=SimpleNamespace(draft_worker=worker))

    async def get_internal_state(self) -> list[dict]:
        state: dict = {}
        add_vericache(None, self.controller, state)
        return [state]

    async def set_internal_state(self, update: SetInternalStateReq) -> list[bool]:
        handlers: dict = {}
        add_switch(handlers, self.controller)
        for key, value in update.server_args.items():
            try:
                handlers[key].validate(key, value)
            except UpdateRejected:
                return [False]
            assert handlers[key].apply(key, value) is None, "not a setting of ServerArgs"
        return [True]


@pytest.fixture
def worker(monkeypatch):
    worker = Worker()
    state = SimpleNamespace(tokenizer_manager=Manager(worker))
    monkeypatch.setattr(http_routes, "get_global_state", lambda: state)
    return worker


def client(**keys: str) -> TestClient:
    app = FastAPI()
    http_routes.add_routes(app)
    http_routes.add_routes(app)
    assert len([route for route in app.routes if getattr(route, "path", "") == "/vericache"]) == 2
    if keys:
        add_api_key_middleware(app, **({"api_key": None, "admin_api_key": None} | keys))
    return TestClient(app)


def test_status_and_switch(worker):
    """Catches a switch that answers before it has switched, or only switches one way."""
    http = client()
    assert http.get("/vericache").json() == worker.status()
    for on in (False, False, True):
        answer = http.post("/vericache", json={"drafting": on})
        assert answer.status_code == 200 and answer.json()["drafting"] is on is worker.drafting
    assert http.get("/vericache").json()["drafting"] is True


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is not JSON: accepted is"),
        (b"{", "The body is not JSON"),
        (b"\xff", "The body is not JSON"),
        (b"false", "The body is not an object"),
        (b"[]", "The body is not an object"),
        (b"{}", "drafting is null: accepted is"),
        (b'{"drafting": 0}', "drafting is 0: accepted is"),
        (b'{"drafting": "off"}', 'drafting is "off": accepted is'),
        (b'{"draft": false}', "Key 'draft' is not known. Did you mean drafting?"),
        (b'{"drafting": false, "horizon": 3}', "Key 'horizon' is not known."),
    ],
)
def test_bad_body(worker, body, sentence):
    """Catches a body that is half understood, and a traceback as an answer."""
    answer = client().post("/vericache", content=body)
    assert answer.status_code == 400 and sentence in answer.json()["error"]
    assert worker.drafting is True


@pytest.mark.parametrize(
    ("keys", "key", "get", "post"),
    [
        ({}, None, 200, 200),
        ({"api_key": "user"}, None, 401, 401),
        ({"api_key": "user"}, "user", 200, 200),
        ({"admin_api_key": "admin"}, None, 200, 401),
        ({"admin_api_key": "admin"}, "admin", 200, 200),
        ({"api_key": "user", "admin_api_key": "admin"}, "user", 200, 401),
        ({"api_key": "user", "admin_api_key": "admin"}, "admin", 401, 200),
    ],
)
def test_keys(worker, keys, key, get, post):
    """Catches a switch that anyone may turn where SGLang's other controls need the admin key."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    http = client(**keys)
    assert http.get("/vericache", headers=headers).status_code == get
    answer = http.post("/vericache", headers=headers, json={"drafting": False})
    assert answer.status_code == post
    assert worker.drafting is (post != 200)


def test_update_of_the_scheduler():
    """Catches a value that SGLang's update protocol lets through and ours does not know, and a
    handler on a server without the flag."""
    worker = Worker()
    controller = SimpleNamespace(scheduler=SimpleNamespace(draft_worker=worker))
    handlers: dict = {}
    add_switch(handlers, controller)
    for value in (2, -1, 0.5):
        with pytest.raises(UpdateRejected, match="neither 0 nor 1"):
            handlers[SWITCH].validate(SWITCH, value)
    handlers[SWITCH].validate(SWITCH, 0)
    handlers[SWITCH].apply(SWITCH, 0)
    assert worker.drafting is False
    nothing: dict = {}
    add_switch(nothing, SimpleNamespace(scheduler=SimpleNamespace(draft_worker=None)))
    assert nothing == {}


def test_the_handlers_are_asked_for_at_each_update():
    """Catches a release that builds its handlers once, before the hook."""
    names = SchedulerInternalStateController.set_internal_state.__code__.co_names
    assert "_update_handlers" in names
