"""When a drafting says that it needs nothing of its arguments any more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_vericache.draft.drafter import Drafter


@pytest.mark.parametrize("captured", [True, False])
def test_what_is_loaded_is_told_before_the_first_step(captured):
    """Catches a scheduler that overwrites what the device has not read yet, and one that waits for
    all that is drafted."""
    done: list[str] = []
    step = SimpleNamespace(
        load=lambda *arguments: done.append("load"),
        advance=lambda size: done.append("step"),
    )
    graphs = SimpleNamespace(size_for=lambda n: n, replay=lambda size: done.append("step"))
    batch = SimpleNamespace(req_pool_indices=torch.tensor([1, 2]))
    two = torch.tensor([7, 8])
    Drafter(step, graphs if captured else None).run(
        batch, [(0, 2), (1, 3)], [0, 1], two, two, lambda: done.append("told")
    )
    assert done == ["load", "told", "step", "step", "step"]
