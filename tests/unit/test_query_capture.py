"""QueryCapture: which queries of a batch are seen, of which request and which layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from score_fakes import make_rotary

from sglang_vericache.compressors.query_stats import StatsWatch
from sglang_vericache.compressors.window import WindowWatch
from sglang_vericache.draft import query_capture
from sglang_vericache.draft.query_capture import CaptureRange, QueryCapture

LAYERS, HEADS, DIM = 3, 2, 4


class Backend:
    """Like SGLang's attention backends: forward gets flat queries and a layer."""

    def __init__(self, outlives: bool = False) -> None:
        self.calls, self.outlives = [], outlives

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        self.calls.append((k, v, layer.layer_id, forward_batch, save_kv_cache))
        return q * 2

    def run(self, tokens: int, first: int = 0) -> None:
        """One forward pass: query i of layer l is filled with 1000 l + first + i."""
        for layer_id in range(LAYERS):
            layer = SimpleNamespace(layer_id=layer_id, tp_q_head_num=HEADS, qk_head_dim=DIM)
            values = 1000 * layer_id + torch.arange(first, first + tokens).float()
            q = values[:, None].expand(-1, HEADS * DIM).contiguous()
            out = self.forward(q, "k", "v", layer, "batch", save_kv_cache=False)
            assert torch.equal(out, q * 2)
            if not self.outlives:
                q.fill_(-1)  # the memory goes to the next layer


class CountingWatch(WindowWatch):
    """Notes what it sees layer by layer."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        object.__setattr__(self, "seen", [])

    def see_pass(self, queries, rows, rotary):
        self.seen.append(tuple(queries.shape))
        return super().see_pass(queries, rows, rotary)


def content(window) -> list[int]:
    """The queries' fillings, after checking that all layers, heads and dimensions agree."""
    values = window.queries - 1000 * torch.arange(LAYERS)[:, None, None, None]
    first = values[0, :, 0, 0]
    assert torch.equal(values, first[None, :, None, None].expand_as(values))
    return first.int().tolist()


def capture_of(tokens: int = 4) -> tuple[Backend, QueryCapture]:
    backend = Backend()
    return backend, QueryCapture(backend, WindowWatch(tokens))


def test_each_request_gets_its_own_queries():
    """Catches offsets that are mixed up, positions instead of offsets, and queries that are not
    copied: their memory is used again."""
    backend, capture = capture_of()
    ranges = [CaptureRange("a", 100, 103, 2), CaptureRange("b", 7, 9, 8)]
    with capture.during(ranges):
        backend.run(12)
    a, b = capture.observation("a"), capture.observation("b")
    assert (content(a), a.positions) == ([2, 3, 4], (100, 101, 102))
    assert (content(b), b.positions) == ([8, 9], (7, 8))
    assert capture.observation("c") is None


@pytest.mark.parametrize(
    ("outlives", "limit", "requests"),
    [(True, 1 << 20, 1), (True, 1, 1), (True, 1 << 20, 2), (False, 1 << 20, 1)],
    ids=["held", "too much to hold", "two requests", "in a graph"],
)
def test_queries_that_outlive_their_layer(monkeypatch, outlives, limit, requests):
    """Catches queries that are read when their memory has been used again, the wrong tokens of
    those that are not copied one layer at a time, and a pass that is kept alive by what was seen.
    """
    monkeypatch.setattr(query_capture, "HELD_BYTES", limit)
    held = outlives and limit > 1 and requests == 1
    backend, watch = Backend(outlives=held), CountingWatch(4)
    capture = QueryCapture(backend, watch, outlive=lambda: outlives)
    ranges = [CaptureRange("a", 100, 103, 2), CaptureRange("b", 7, 9, 8)][:requests]
    for first in (0, 50):  # what was decided for one pass says nothing of the next
        with capture.during(ranges):
            backend.run(12, first)
        a = capture.observation("a")
        assert (content(a), a.positions) == ([first + i for i in (2, 3, 4)], (100, 101, 102))
        assert a.queries.untyped_storage().nbytes() == a.bytes
        if requests > 1:
            assert content(capture.observation("b")) == [first + 8, first + 9]
    assert len(watch.seen) == (0 if held else 2 * LAYERS)


def test_the_forward_is_passed_on():
    """Catches arguments lost or a result replaced on the way to attention itself."""
    backend, capture = capture_of()
    with capture.during([CaptureRange("a", 0, 1, 0)]):
        backend.run(2)
    assert backend.calls == [("k", "v", layer, "batch", False) for layer in range(LAYERS)]


def test_nothing_is_seen_outside():
    """Catches queries of decode steps, or of requests that will not draft."""
    backend, capture = capture_of()
    with capture.during([]):
        backend.run(5)
    backend.run(5)
    assert capture.observations == {}


def test_chunks_are_joined():
    """Catches a chunk that replaces the one before it, and one that is joined after a gap: the
    request was retracted and came back with another prefix."""
    backend, capture = capture_of()
    for r, first in ((CaptureRange("a", 10, 12, 0), 10), (CaptureRange("a", 12, 15, 0), 12)):
        with capture.during([r]):
            backend.run(r.end - r.start, first)
    assert content(capture.observation("a")) == [11, 12, 13, 14]
    with capture.during([CaptureRange("a", 20, 21, 0)]):
        backend.run(1, 20)
    assert content(capture.observation("a")) == [20]


def test_a_replayed_pass_shows_nothing():
    """Catches a crash where SGLang replays an extend pass as a graph: scoring without queries is
    only worse, and counted."""
    _, capture = capture_of()
    with capture.during([CaptureRange("a", 0, 5, 0)]):
        pass
    assert capture.observation("a") is None


def test_forget():
    """Catches observations of finished requests that pile up."""
    backend, capture = capture_of()
    with capture.during([CaptureRange("a", 0, 1, 0)]):
        backend.run(1)
    capture.forget("a")
    capture.forget("a")
    assert capture.observations == {}


def test_a_failed_forward_leaves_nothing():
    """Catches half of the layers taken for an observation, or capture that stays on."""
    backend, capture = capture_of()
    with pytest.raises(RuntimeError), capture.during([CaptureRange("a", 0, 1, 0)]):
        backend.run(1)
        raise RuntimeError
    backend.run(1)
    assert capture.observations == {}


@pytest.mark.parametrize(
    ("start", "count", "total", "wanted"),
    [
        pytest.param(0, 10, 10, (6, 10, 56), id="end-of-a-prompt"),
        pytest.param(0, 6, 10, None, id="chunk-before-the-end"),
        pytest.param(4, 4, 10, (6, 8, 52), id="chunk-that-reaches-it"),
        pytest.param(8, 2, 10, (8, 10, 50), id="last-chunk"),
    ],
)
def test_range_of(start, count, total, wanted):
    """Catches a chunk's queries counted from the prompt's start instead of the batch's."""
    found = capture_of()[1].range_of("a", start, count, total, offset=50)
    assert found == (CaptureRange("a", *wanted) if wanted else None)


def test_no_watch_leaves_the_backend_alone():
    """Catches a forward wrapped for scorers that need nothing."""
    backend = Backend()
    before = backend.forward
    capture = QueryCapture(backend, None)
    assert backend.forward == before
    assert capture.range_of("a", 0, 10, 10, 0) is None


def test_statistics_use_the_layer_and_the_position():
    """Catches the first layer's rotary embedding used for all, or positions that start anew in
    each chunk."""
    backend = Backend()
    rotary = [make_rotary(DIM, 40, theta=10.0 ** (layer + 1)) for layer in range(LAYERS)]
    capture = QueryCapture(backend, StatsWatch(), rotary)
    for start, count in ((4, 10), (14, 6)):
        with capture.during([CaptureRange("a", start, start + count, 0)]):
            backend.run(count, start)
    seen = capture.observation("a")
    assert (seen.start, seen.end, seen.count) == (4, 20, 16)
    for layer in range(LAYERS):
        queries = 1000.0 * layer + torch.arange(4, 20).float()
        wanted = rotary[layer].undo(queries[:, None, None].expand(-1, HEADS, DIM), 4)
        found = seen.inputs(layer)["query_stats"]
        torch.testing.assert_close(found.mean, wanted.mean(0), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(
            found.variance, wanted.var(0, correction=0), rtol=1e-3, atol=1e-2
        )
