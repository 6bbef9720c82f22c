"""Our routes on SGLang's HTTP server."""

from __future__ import annotations

import os

from sglang_vericache.hooks import Hook

APP_PATH = "SGLANG_HTTP_SERVER_APP_PATH"


def add_routes(*args, **kwargs) -> None:
    from sglang.srt.entrypoints.http_server import app

    from sglang_vericache import http_routes

    http_routes.add_routes(app)
    # Read only where several worker processes import their app.
    os.environ.setdefault(APP_PATH, "sglang_vericache.http_app:app")


def register() -> None:
    """Let the patch add the routes; only a process that serves HTTP imports them."""
    from sglang.srt.plugins import register_http_routes

    register_http_routes(_add_to)


def _add_to(app) -> None:
    from sglang_vericache import http_routes

    http_routes.add_routes(app)


HOOKS = (
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "before",
        add_routes,
        "a plugin cannot add routes, and HTTP worker processes load no plugins",
        "0013-plugin-routes.patch",
        "sglang.srt.plugins.register_http_routes",
        register,
    ),
)
