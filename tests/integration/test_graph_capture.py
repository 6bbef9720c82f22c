"""The order of a capture, with a device that only takes notes. Replays need a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sglang_vericache import graph_capture
from sglang_vericache.draft.graphs import DraftGraphs, draft_sizes
from sglang_vericache.graph_capture import WARM_UPS, open_capture


@pytest.fixture
def notes(monkeypatch) -> list:
    """What was done, on which stream, and whether it was captured."""
    found: list = []
    state = SimpleNamespace(stream="default", captured=False)

    def note(what) -> None:
        found.append((what, state.stream, state.captured))

    class Stream:
        def __init__(self, name: str = "own") -> None:
            self.name = name

        def wait_stream(self, other) -> None:
            found.append(f"{self.name} waits for {other.name}")

        def synchronize(self) -> None:
            found.append(f"host waits for {self.name}")

    @contextmanager
    def on_stream(stream):
        before, state.stream = state.stream, stream.name
        yield
        state.stream = before

    @contextmanager
    def graph(made, pool, stream):
        assert pool == "memory"
        state.captured = True
        with on_stream(stream):
            yield
        state.captured = False

    @contextmanager
    def capture_mode():
        found.append("capture mode")
        yield
        found.append("no capture mode")

    for name, value in (
        ("graph_pool_handle", lambda: "memory"),
        ("Stream", Stream),
        ("current_stream", lambda: Stream("default")),
        ("stream", on_stream),
        ("CUDAGraph", lambda: SimpleNamespace()),
        ("graph", graph),
        ("mem_get_info", lambda: (0, 0)),
        ("synchronize", lambda: found.append("host waits for all")),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graph_capture, "model_capture_mode", capture_mode)
    found.append(note)
    return found


def test_a_capture_follows_what_came_before_it(notes):
    """Catches warm-ups that run before what they read has been set, and work after the capture
    that does not wait for it."""
    note = notes.pop()
    with open_capture("graphs") as capture:
        note("prepared")
        _, result = capture(lambda: note("run") or "result")
    assert result == "result"
    assert notes == [
        "own waits for default",
        "capture mode",
        ("prepared", "own", False),
        *[("run", "own", False)] * WARM_UPS,
        "host waits for own",
        ("run", "own", True),
        "no capture mode",
        "default waits for own",
        "host waits for all",
    ]


def test_draft_steps_of_all_sizes(notes):
    """The largest first, each after its own padding was set on the stream that runs it."""
    note = notes.pop()
    step = SimpleNamespace(
        load_padding=lambda size: note(f"load {size}"),
        advance=lambda size: note(f"advance {size}"),
    )
    graphs = DraftGraphs(step, [1, 2, 4])
    graphs.capture()
    done = [entry for entry in notes if isinstance(entry, tuple)]
    assert done == [
        entry
        for size in (4, 2, 1)
        for entry in (
            (f"load {size}", "own", False),
            *[(f"advance {size}", "own", False)] * WARM_UPS,
            (f"advance {size}", "own", True),
        )
    ]
    assert [graphs.size_for(n) for n in (1, 3, 4, 5)] == [1, 4, 4, None]


@pytest.mark.parametrize("most", [1, 3, 8, 64, 160, 256, 300, 512])
def test_sizes_of_draft_graphs(most):
    """Against SGLang's own lists: those of a server without a speculative algorithm."""
    from sglang.srt.arg_groups.cuda_graph_hook import generate_decode_cuda_graph_batch_sizes

    def sizes(algorithm):
        settings = SimpleNamespace(
            disable_cuda_graph_padding=False, speculative_algorithm=algorithm
        )
        return generate_decode_cuda_graph_batch_sizes(settings, most)

    assert draft_sizes(sizes("VERICACHE")) == sorted(sizes(None))
