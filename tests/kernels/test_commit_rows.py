"""commit_rows against a loop: exact KV of accepted tokens goes into the tails."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache.kernels.commit_rows import commit_rows
from sglang_vericache.kernels.pool_format import DenseFormat, PoolStorage

LAYERS, HEADS, DIM = 3, 2, 5
MAIN_SLOTS, DRAFT_SLOTS = 30, 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param([4], [7], id="one"),
        pytest.param([4, 0, 29, 11], [7, 20, 1, 2], id="scattered"),
        pytest.param([4, 5, 6, 9, 9], [7, 8, 0, 0, 3], id="dropped"),
        pytest.param([4, 5], [0, 0], id="all-dropped"),
        pytest.param([], [], id="none"),
    ],
)
def test_against_a_loop(source, target, dtype):
    """Catches layers or tokens mixed up, keys in the values' place, writes to other slots, and a
    rejected token that lands anywhere but in slot 0."""
    keys, values = (list(part) for part in torch.randn(2, LAYERS, MAIN_SLOTS, HEADS, DIM).to(dtype))
    storage = PoolStorage(DenseFormat(dtype), LAYERS, DRAFT_SLOTS, HEADS, DIM, "cpu")
    for tensor in storage.tensors.values():
        tensor.copy_(torch.randn(tensor.shape))
    wanted = {name: tensor.clone() for name, tensor in storage.tensors.items()}
    for layer in range(LAYERS):
        for from_slot, to_slot in zip(source, target, strict=True):
            wanted["keys"][layer, to_slot] = keys[layer][from_slot]
            wanted["values"][layer, to_slot] = values[layer][from_slot]
    commit_rows(
        keys,
        values,
        torch.tensor(source, dtype=torch.int64),
        storage,
        torch.tensor(target, dtype=torch.int64),
    )
    for name, tensor in storage.tensors.items():
        # Slot 0 holds whichever dropped token came last; nobody reads it.
        assert torch.equal(tensor[:, 1:], wanted[name][:, 1:]), name


def test_the_main_pool_is_only_read():
    """Catches a copy in the wrong direction."""
    keys, values = (list(part) for part in torch.randn(2, LAYERS, MAIN_SLOTS, HEADS, DIM))
    before = torch.stack(keys + values)
    storage = PoolStorage(DenseFormat(torch.float32), LAYERS, DRAFT_SLOTS, HEADS, DIM, "cpu")
    commit_rows(keys, values, torch.tensor([1, 2]), storage, torch.tensor([3, 4]))
    assert torch.equal(torch.stack(keys + values), before)


def test_layers_must_pair_up():
    """Catches a pool with a layer less, whose last layers would silently stay stale."""
    keys, values = (list(part) for part in torch.randn(2, LAYERS, MAIN_SLOTS, HEADS, DIM))
    storage = PoolStorage(DenseFormat(torch.float32), LAYERS, DRAFT_SLOTS, HEADS, DIM, "cpu")
    with pytest.raises(ValueError):
        commit_rows(keys, values[:-1], torch.tensor([1]), storage, torch.tensor([3]))
