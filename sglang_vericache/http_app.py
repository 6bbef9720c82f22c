"""The HTTP app in a worker process of ``--tokenizer-worker-num``.

Such a process imports its app and never loads plugins; named in SGLANG_HTTP_SERVER_APP_PATH,
this file does both.
"""

from __future__ import annotations

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402

from sglang_vericache.http_routes import add_routes  # noqa: E402

add_routes(app)

__all__ = ["app"]
