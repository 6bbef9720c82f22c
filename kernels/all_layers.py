"""What kernels that copy rows of all layers from the main pool into a draft pool share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.pool_format import PoolStorage
from sglang_vericache.kernels.row_codec import TRITON_DTYPES, rotation_of, typed

# A program moves 32 rows of 128 to 256 bytes: enough to hide its start, small enough for registers.
LAYER_COPY = {"BLOCK_ROWS": 32, "num_warps": 4}


@triton.jit
def layer_buffer(pointers, layer, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointer to the buffer of a layer; the compiler cannot see how it is aligned."""
    address = tl.load(pointers + layer)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)


def main_pool_arguments(
    key_buffers: Sequence[torch.Tensor],
    value_buffers: Sequence[torch.Tensor],
    storage: PoolStorage,
) -> dict[str, Any]:
    """Kernel arguments that describe the main pool.

    Raises:
        ValueError: it does not fit the draft pool.
    """
    if not len(key_buffers) == len(value_buffers) == storage.layers:
        raise ValueError(
            f"{len(key_buffers)} key and {len(value_buffers)} value buffers for a pool of "
            f"{storage.layers} layers"
        )
    keys, values = LayerBuffers.of(key_buffers), LayerBuffers.of(value_buffers)
    for part, buffers in (("key", keys), ("value", values)):
        if buffers[0].shape[1:] != (storage.heads, storage.head_dim):
            raise ValueError(
                f"{part} buffers {tuple(buffers[0].shape)} for a pool of {storage.heads} heads of "
                f"{storage.head_dim}"
            )
    if (keys.slot_stride, keys[0].dtype) != (values.slot_stride, values[0].dtype):
        raise ValueError("key and value buffers differ in layout")
    return {
        "key_pointers": keys.pointers,
        "value_pointers": values.pointers,
        "slot_stride": keys.slot_stride,
        "SOURCE": TRITON_DTYPES[keys[0].dtype],
        "ALIGNMENT": min(keys.alignment, values.alignment),
    }


def pool_arguments(storage: PoolStorage) -> dict[str, Any]:
    """Kernel arguments that describe the draft pool."""
    keys, scales = storage.tensors["keys"], storage.tensors.get("scales")
    return {
        "pool_keys": typed(keys),
        "pool_values": typed(storage.tensors["values"]),
        "scales": scales,
        "pool_stride": keys.stride(0),
        "scales_stride": 0 if scales is None else scales.stride(0),
        "HEADS": storage.heads,
        "DIM": storage.head_dim,
        "BLOCK_D": triton.next_power_of_2(storage.head_dim),
        "ROTATION": rotation_of(storage),
    }
