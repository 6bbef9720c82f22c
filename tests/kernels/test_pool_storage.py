"""PoolStorage: what is written is read back, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache.kernels.pool_format import DenseFormat, PoolStorage

LAYERS, SLOTS, HEADS, DIM = 3, 20, 2, 5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def storage_of(dtype: torch.dtype) -> PoolStorage:
    return PoolStorage(DenseFormat(dtype), LAYERS, SLOTS, HEADS, DIM, "cpu")


@DTYPES
def test_roundtrip(dtype):
    """Catches keys and values exchanged, a dtype converted twice, and slots out of order."""
    storage = storage_of(dtype)
    slots = torch.tensor([7, 20, 1])
    keys, values = torch.randn(2, 3, HEADS, DIM)
    storage.write(1, slots, keys, values)
    for order in ([0, 1, 2], [2, 0, 1]):
        found_keys, found_values = storage.read(1, slots[order])
        assert found_keys.dtype == found_values.dtype == dtype
        assert torch.equal(found_keys, keys.to(dtype)[order])
        assert torch.equal(found_values, values.to(dtype)[order])


@DTYPES
def test_write_touches_its_layer_and_slots_only(dtype):
    """Catches a write to every layer, or to the slots next to those given."""
    storage = storage_of(dtype)
    for tensor in storage.tensors.values():
        tensor.fill_(3)
    storage.write(1, torch.tensor([4, 9]), *torch.zeros(2, 2, HEADS, DIM))
    for tensor in storage.tensors.values():
        changed = (tensor != 3).any(dim=(2, 3)).nonzero().tolist()
        assert changed == [[1, 4], [1, 9]]


def test_read_keeps_the_shape_of_the_slots():
    """Catches a gather that only works for one row of slots."""
    storage = storage_of(torch.float32)
    keys, values = torch.randn(2, 4, HEADS, DIM)
    storage.write(0, torch.tensor([1, 2, 3, 4]), keys, values)
    found, _ = storage.read(0, torch.tensor([[4, 1], [2, 2]]))
    assert torch.equal(found, keys[torch.tensor([[3, 0], [1, 1]])])


@DTYPES
def test_every_slot_and_the_padding_exist(dtype):
    """Catches storage that is one slot short: slot 0 is padding, so the last is `slots`."""
    storage = storage_of(dtype)
    storage.write(LAYERS - 1, torch.tensor([0, SLOTS]), *torch.ones(2, 2, HEADS, DIM))
    assert (storage.read(LAYERS - 1, torch.tensor([SLOTS]))[0] == 1).all()
    assert not storage.read(0, torch.arange(SLOTS + 1))[0].any(), "starts with zeros"


@DTYPES
def test_row_bytes_are_what_is_allocated(dtype):
    """Catches a size that leaves out the values, the layers or the heads."""
    storage = storage_of(dtype)
    allocated = sum(t.numel() * t.element_size() for t in storage.tensors.values())
    assert storage.row_bytes * (SLOTS + 1) == allocated


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32")]
)
def test_name(dtype, name):
    """Catches a status page that shows Python's spelling of a dtype."""
    assert DenseFormat(dtype).name == name
