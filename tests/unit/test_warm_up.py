"""What is warmed up before the first request touches nothing that a request reads."""

from __future__ import annotations

import pytest
import torch
from view_fakes import DIM, HEADS, World

from sglang_vericache.compressors.registry import SCORERS, create_scorer
from sglang_vericache.compressors.rotary import Rotary
from sglang_vericache.config import CompressorSpec
from sglang_vericache.tree import warm_up as module
from sglang_vericache.tree.warm_up import WINDOWS, warm_up


@pytest.mark.parametrize("name", SCORERS)
def test_only_padding_is_written(name, monkeypatch):
    """Catches a warm-up that needs something a scorer does not have, one that leaves rows behind,
    and one that scores without the queries that a kernel is compiled for."""
    scorer = create_scorer(CompressorSpec(name))
    world = World(scorer=scorer, rotary=Rotary(torch.ones(2000, DIM)))
    seen = []
    real = type(scorer).score_layers
    monkeypatch.setattr(
        type(scorer), "score_layers", lambda self, path: seen.append(path) or real(self, path)
    )
    storage = world.pool.storage
    before = {name: tensor.clone() for name, tensor in storage.tensors.items()}
    main = [buffer.clone() for buffer in world.full.keys]
    warm_up(world.full, storage, scorer, 2 * HEADS, torch.float32)
    for tensor_name, tensor in storage.tensors.items():
        assert torch.equal(tensor[:, 1:], before[tensor_name][:, 1:])
    assert all(torch.equal(a, b) for a, b in zip(main, world.full.keys, strict=True))
    counts = [path.observation.count if path.observation else 0 for path in seen]
    assert counts == (list(WINDOWS) if scorer.watch is not None else [0] * len(WINDOWS))


def test_every_kernel_of_a_build_is_called(monkeypatch):
    """Catches a kernel that the first request would still have to compile."""
    called = []
    for name in ("gather_span", "regather_span", "commit_rows"):
        monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
    world = World()
    warm_up(world.full, world.pool.storage, world.views.scorer, HEADS, torch.float32)
    assert called == ["gather_span", "regather_span", "commit_rows"]
