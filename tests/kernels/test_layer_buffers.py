"""LayerBuffers: addresses that kernels can trust."""

from __future__ import annotations

import pytest
import torch
from pools import DEVICE

from sglang_vericache.kernels.layer_buffers import LayerBuffers


def test_a_list_of_tensors_with_addresses():
    """Catches addresses out of order, and slices that keep the whole list's."""
    tensors = list(torch.zeros(3, 6, 2, 16, device=DEVICE))
    buffers = LayerBuffers(tensors)
    assert LayerBuffers.of(buffers) is buffers
    assert len(buffers) == 3 and all(a is b for a, b in zip(buffers, tensors, strict=True))
    assert buffers.pointers.tolist() == [tensor.data_ptr() for tensor in tensors]
    some = buffers[1:]
    assert len(some) == 2 and some[0] is tensors[1]
    assert some.pointers.tolist() == buffers.pointers.tolist()[1:]
    assert (some.slot_stride, some.alignment) == (32, 16)


def test_alignment_is_what_all_addresses_share():
    """Catches 16-byte loads from addresses that are no multiple of 16."""
    whole = torch.zeros(100, dtype=torch.bfloat16, device=DEVICE)
    assert LayerBuffers([whole[:24].view(3, 1, 8), whole[24:48].view(3, 1, 8)]).alignment == 16
    assert LayerBuffers([whole[:24].view(3, 1, 8), whole[28:52].view(3, 1, 8)]).alignment == 8
    assert LayerBuffers([whole[:24].view(3, 1, 8), whole[27:51].view(3, 1, 8)]).alignment == 2


@pytest.mark.parametrize(
    "other",
    [torch.zeros(6, 2, 8), torch.zeros(6, 2, 16).half(), torch.zeros(6, 4, 16)[:, ::2]],
    ids=["shape", "dtype", "strides"],
)
def test_buffers_must_be_alike(other):
    """Catches a layer that would be read with another's strides."""
    with pytest.raises(ValueError):
        LayerBuffers([torch.zeros(6, 2, 16), other])
    with pytest.raises(ValueError, match="contiguous heads"):
        LayerBuffers([torch.zeros(6, 16, 2).transpose(1, 2)])
