"""Which captured pass stands for a verification, and what it is given. Replays need a GPU."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from sglang_vericache.verify import graphs as module
from sglang_vericache.verify.chain_plan import ChainPlan
from sglang_vericache.verify.graphs import VerifyGraphs, fits_workspace

WIDTHS, MOST = (5, 9, 17), 20


class Plan:
    """As much of a plan as choosing needs; room for 1000 slots."""

    def __init__(self, size: int, width: int) -> None:
        self.size, self.width = size, width
        self.kv_indices = torch.zeros(1000, dtype=torch.int32)

    fits = ChainPlan.fits


@pytest.fixture
def graphs() -> VerifyGraphs:
    runner = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(9, 9)))
    drafts = torch.zeros((30, 17), dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int32)
    graphs = VerifyGraphs(runner, drafts, None, WIDTHS, MOST, none, 100)
    for size in graphs.sizes:
        for width in graphs.widths:
            graphs._plans[size, width] = Plan(size, width)
    return graphs


@pytest.mark.parametrize(
    ("requests", "width", "shape"),
    [(1, 5, (1, 5)), (1, 2, (1, 5)), (3, 6, (4, 9)), (17, 17, (20, 17)), (20, 10, (20, 17))],
)
def test_a_pass_is_padded_to_the_next_shape(graphs, requests, width, shape):
    """Catches a captured pass that has no room for a request or for a drafted token."""
    assert graphs.shape_for([10] * requests, width) == shape


@pytest.mark.parametrize(
    ("committed", "width"),
    [
        pytest.param([10] * 21, 5, id="too-many"),
        pytest.param([10], 18, id="too-wide"),
        pytest.param([900, 100], 9, id="too-long"),
        pytest.param([235] * 4, 17, id="one-slot-too-long"),
    ],
)
def test_what_fits_no_shape_runs_eagerly(graphs, committed, width):
    """Catches a list of slots that is written past its end."""
    assert graphs.shape_for(committed, width) is None


def test_the_last_slot_is_used(graphs):
    assert graphs.shape_for([233] * 4, 17) == (4, 17)


def test_padding_is_the_padding_row(graphs):
    """Catches state of a larger pass that stays behind: its requests would be written to."""
    old = torch.full((8,), 7)
    graphs.load((8, 5), old, old, old, old)
    rows, pending, committed, lengths = (torch.arange(3) + n for n in (10, 20, 30, 2))
    graphs.load((8, 5), rows, pending, committed, lengths)
    assert graphs.requests[:8].tolist() == [10, 11, 12, 0, 0, 0, 0, 0]
    assert graphs.pending[:8].tolist() == [20, 21, 22, 0, 0, 0, 0, 0]
    assert graphs.committed[:8].tolist() == [30, 31, 32, 0, 0, 0, 0, 0]
    assert graphs.lengths[:8].tolist() == [2, 3, 4, 0, 0, 0, 0, 0]


def test_what_a_graph_was_captured_with_stays(graphs, monkeypatch):
    """Catches inputs of a captured pass that are given back: the memory went to the plans of the
    passes captured next, which each replay then wrote over."""
    inputs = []

    class Inputs:
        def __init__(self) -> None:
            inputs.append(weakref.ref(self))

    monkeypatch.setattr(module, "ChainPlan", lambda runner, size, width, indices: Plan(size, width))
    monkeypatch.setattr(module, "fits_workspace", lambda plan: True)
    monkeypatch.setattr(graphs, "_static_batch", lambda size, width: Inputs())
    monkeypatch.setattr(graphs, "_pass", lambda plan, batch, size, width: None)
    for shape in ((8, 5), (8, 9)):
        graphs._capture(*shape, lambda run: (None, run()))
    gc.collect()
    assert len(inputs) == 2
    assert all(reference() is not None for reference in inputs)


@pytest.mark.parametrize(
    ("message", "fits"),
    [
        (None, True),
        ("Buffer overflow [...] available in AlignedAllocator. Increase the workspace", False),
    ],
)
def test_a_pass_that_the_workspace_cannot_hold_is_not_captured(message, fits):
    """Catches a server that does not start for a long horizon and many heads."""

    def plan(committed) -> None:
        if message is not None:
            raise RuntimeError(message)

    assert fits_workspace(SimpleNamespace(plan=plan)) == fits


def test_other_faults_of_a_plan_are_not_hidden():
    def plan(committed) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        fits_workspace(SimpleNamespace(plan=plan))


def test_what_was_not_captured_runs_eagerly(graphs):
    del graphs._plans[20, 17]
    assert graphs.shape_for([10] * 17, 17) is None
    assert graphs.shape_for([10] * 17, 9) == (20, 9)
