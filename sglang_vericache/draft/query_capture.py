"""Observing the queries of a prompt while it is prefilled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sglang_vericache.compressors.rotary import Rotary
from sglang_vericache.compressors.watch import Observation, PassRows, Watch

# Of a layer's queries, with the keys and values that they were computed with, which are kept until
# the end of the pass instead of copied. 1K tokens of a model whose layers take the host longer than
# the device; where the device takes longer, launching a copy costs nothing.
HELD_BYTES = 2 << 20


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
    """Observations of the requests in prefill, by request id.

    The attention backend is the one place that sees every layer's queries after rotary
    embedding; its ``forward`` is wrapped on the instance, so nothing else changes.

    Args:
        backend: SGLang's AttentionBackend, or anything with its ``forward``.
        watch: what the scorer wants to know; None leaves the backend alone.
        rotary: rotary embedding by layer, for a watch that undoes it.
        outlive: whether the queries of the pass that begins stay as they are until its end; in a
            CUDA graph their memory is used again.
    """

    def __init__(
        self,
        backend: Any,
        watch: Watch | None,
        rotary: Sequence[Rotary] | None = None,
        outlive: Callable[[], bool] = lambda: False,
    ) -> None:
        self.watch, self.rotary, self._outlive = watch, rotary, outlive
        self.observations: dict[str, Observation] = {}
        self._rows: PassRows | None = None
        self._parts: list[Any] = []  # by layer
        self._held, self._heads = False, (0, 0)  # the parts are the queries of the pass
        if watch is not None:
            self._wrap(backend)

    def _wrap(self, backend: Any) -> None:
        forward = backend.forward

        def capturing_forward(q, k, v, layer, *args, **kwargs):
            if self._rows is not None:
                self._see(q, layer, self._rows)
            return forward(q, k, v, layer, *args, **kwargs)

        backend.forward = capturing_forward

    def _see(self, q: torch.Tensor, layer: Any, rows: PassRows) -> None:
        if not self._parts:
            self._held = self._held and q.untyped_storage().nbytes() <= HELD_BYTES
            self._heads = layer.tp_q_head_num, layer.qk_head_dim
        if self._held:
            self._parts.append(q)
            return
        heads = q.view(q.shape[0], layer.tp_q_head_num, layer.qk_head_dim)
        rotary = self.rotary[layer.layer_id] if self.rotary is not None else None
        self._parts.append(self.watch.see_pass(heads, rows, rotary))

    def range_of(
        self, rid: str, start: int, count: int, prompt_tokens: int, offset: int
    ) -> CaptureRange | None:
        """What is wanted of a chunk of ``count`` tokens from position ``start`` on, or None.

        Args:
            offset: of the chunk in the flat batch of input tokens.
        """
        if self.watch is None:
            return None
        first, end = self.watch.first_wanted(start, prompt_tokens), start + count
        return CaptureRange(rid, first, end, offset + first - start) if first < end else None

    def ranges_of(
        self, batch: Any, drafts: Callable[[Any], bool], least: int | None
    ) -> list[CaptureRange]:
        """What is wanted of each request of a prefill, where anything is.

        Args:
            batch: SGLang's ScheduleBatch, or anything with its lengths.
            drafts: whether a request may draft at all.
            least: tokens of the shortest context that drafts; None where nobody does.
        """
        if least is None:
            return []
        ranges, offset = [], 0
        for req, start, count in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            total = len(req.full_untruncated_fill_ids)
            # A prompt that is in the cache computes its last token again: nothing to be learnt.
            known = total - start == 1 and self.observation(req.rid) is None
            if total >= least and not known and drafts(req):
                ranges.append(self.range_of(req.rid, start, count, total, offset))
            offset += count
        return [r for r in ranges if r is not None]

    @contextmanager
    def during(self, ranges: Sequence[CaptureRange]) -> Iterator[None]:
        """Observe the queries of ``ranges`` in the extend forward inside."""
        if ranges:
            starts, counts = [r.start for r in ranges], [r.end - r.start for r in ranges]
            self._rows = PassRows(starts, counts, [r.offset for r in ranges])
            # Of one request the copy is a single one in the end; several would need theirs anyway.
            self._held = len(ranges) == 1 and not self.watch.undoes_rotary and self._outlive()
        try:
            yield
            # None when the pass replayed a graph, which does not come through Python.
            if self._rows is not None and self._parts:
                for r, observation in zip(ranges, self._observations(self._rows), strict=True):
                    self._store(r, observation)
        finally:
            self._rows, self._parts, self._held = None, [], False

    def _observations(self, rows: PassRows) -> list[Observation]:
        if not self._held:
            return self.watch.observations(self._parts, rows)
        (start,), (count,), (offset,) = rows.starts, rows.counts, rows.offsets
        queries = torch.stack([q.narrow(0, offset, count) for q in self._parts])
        return [self.watch.keep(queries.view(*queries.shape[:2], *self._heads), start)]

    def _store(self, r: CaptureRange, observation: Observation) -> None:
        earlier = self.observations.get(r.rid)
        if earlier is not None and earlier.end == r.start:
            observation = earlier.then(observation)
        self.observations[r.rid] = observation

    def observation(self, rid: str) -> Observation | None:
        return self.observations.get(rid)

    def forget(self, rid: str) -> None:
        self.observations.pop(rid, None)
