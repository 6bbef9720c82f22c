"""commit_rows against a loop: exact KV of accepted tokens goes into the tails."""

from __future__ import annotations

import pytest
import torch
from pools import (
    ALL_FORMATS,
    DEVICE,
    assert_same_bits,
    filled_storage,
    main_pool,
    model_dtype,
    twin,
)

from sglang_vericache.kernels.commit_rows import commit_rows
from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.pool_format import DenseFormat

LAYERS, HEADS = 3, 2
MAIN_SLOTS, DRAFT_SLOTS = 30, 20


def slots(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)


def commit_in_a_loop(keys, values, source, storage, target) -> None:
    for layer in range(LAYERS):
        for from_slot, to_slot in zip(source, target, strict=True):
            encoded = storage.format.encode(keys[layer][from_slot], values[layer][from_slot])
            for name, row in encoded.items():
                storage.tensors[name][layer, to_slot] = row


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
    keys, values = main_pool(LAYERS, MAIN_SLOTS, HEADS, 5, dtype)
    storage = filled_storage(DenseFormat(dtype), LAYERS, DRAFT_SLOTS, HEADS, 5)
    wanted = twin(storage)
    commit_in_a_loop(keys, values, source, wanted, target)
    commit_rows(keys, values, slots(source), storage, slots(target))
    # Slot 0 holds whichever dropped token came last; nobody reads it.
    assert_same_bits(storage, wanted)


@ALL_FORMATS
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (1, 80), (2, 128)])
def test_formats(pool_format, heads, dim):
    """The same mistakes in formats that encode, with more rows than one program moves."""
    keys, values = main_pool(LAYERS, MAIN_SLOTS, heads, dim, model_dtype(pool_format))
    storage = filled_storage(pool_format, LAYERS, DRAFT_SLOTS, heads, dim)
    wanted = twin(storage)
    source = torch.randint(0, MAIN_SLOTS, (14,)).tolist()
    target = [*(torch.randperm(DRAFT_SLOTS)[:12] + 1).tolist(), 0, 0]
    commit_in_a_loop(keys, values, source, wanted, target)
    commit_rows(LayerBuffers(keys), LayerBuffers(values), slots(source), storage, slots(target))
    assert_same_bits(storage, wanted)


def test_buffers_with_gaps():
    """Catches a main pool whose slots are assumed to touch: one that keeps keys and values
    together has both in a slot."""
    together = torch.randn(LAYERS, MAIN_SLOTS, 2, HEADS, 16, device=DEVICE)
    keys, values = (list(together[:, :, part]) for part in range(2))
    storage = filled_storage(DenseFormat(torch.float32), LAYERS, DRAFT_SLOTS, HEADS, 16)
    wanted = twin(storage)
    commit_in_a_loop(keys, values, [4, 29], wanted, [7, 1])
    commit_rows(keys, values, slots([4, 29]), storage, slots([7, 1]))
    assert_same_bits(storage, wanted)


def test_the_main_pool_is_only_read():
    """Catches a copy in the wrong direction."""
    keys, values = main_pool(LAYERS, MAIN_SLOTS, HEADS, 5, torch.float32)
    before = torch.stack(keys + values)
    storage = filled_storage(DenseFormat(torch.float32), LAYERS, DRAFT_SLOTS, HEADS, 5)
    commit_rows(keys, values, slots([1, 2]), storage, slots([3, 4]))
    assert torch.equal(torch.stack(keys + values), before)


def test_layers_must_pair_up():
    """Catches a pool with a layer less, whose last layers would silently stay stale."""
    keys, values = main_pool(LAYERS, MAIN_SLOTS, HEADS, 5, torch.float32)
    storage = filled_storage(DenseFormat(torch.float32), LAYERS, DRAFT_SLOTS, HEADS, 5)
    with pytest.raises(ValueError):
        commit_rows(keys, values[:-1], slots([1]), storage, slots([3]))
