"""Keeping the last queries of a prompt while it is prefilled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_vericache.compressors.window import QueryWindow


@dataclass(frozen=True)
class CaptureRange:
    """Tokens of one request in an extend batch whose queries are wanted.

    Attributes:
        start, end: path positions.
        offset: of ``start`` in the flat batch of input tokens.
    """

    rid: str
    start: int
    end: int
    offset: int


class QueryCapture:
    """Windows of the requests in prefill, by request id.

    The attention backend is the one place that sees every layer's queries after rotary
    embedding; its ``forward`` is wrapped on the instance, so nothing else changes.

    Args:
        limit: queries kept for each request.
    """

    def __init__(self, backend: AttentionBackend, limit: int) -> None:
        self.limit = limit
        self.windows: dict[str, QueryWindow] = {}
        self._rows: torch.Tensor | None = None
        self._taken: list[torch.Tensor] = []
        if limit:
            self._wrap(backend)

    def _wrap(self, backend: AttentionBackend) -> None:
        forward = backend.forward

        def capturing_forward(q, k, v, layer, *args, **kwargs):
            if self._rows is not None:
                heads = q.view(q.shape[0], layer.tp_q_head_num, layer.qk_head_dim)
                self._taken.append(heads[self._rows])
            return forward(q, k, v, layer, *args, **kwargs)

        backend.forward = capturing_forward

    @contextmanager
    def during(self, ranges: Sequence[CaptureRange], device: torch.device) -> Iterator[None]:
        """Capture the queries of ``ranges`` in the extend forward inside."""
        if not ranges or not self.limit:
            yield
            return
        flat = [r.offset + i for r in ranges for i in range(r.end - r.start)]
        self._rows, self._taken = torch.tensor(flat, device=device), []
        try:
            yield
            self._store(ranges, torch.stack(self._taken))
        finally:
            self._rows, self._taken = None, []

    def _store(self, ranges: Sequence[CaptureRange], queries: torch.Tensor) -> None:
        start = 0
        for r in ranges:
            count = r.end - r.start
            window = QueryWindow(
                queries[:, start : start + count].clone(), tuple(range(r.start, r.end))
            )
            earlier = self.windows.get(r.rid)
            if earlier is not None and earlier.end == r.start:
                window = earlier.then(window, self.limit)
            self.windows[r.rid] = window
            start += count

    def window(self, rid: str) -> QueryWindow | None:
        return self.windows.get(rid)

    def forget(self, rid: str) -> None:
        self.windows.pop(rid, None)
