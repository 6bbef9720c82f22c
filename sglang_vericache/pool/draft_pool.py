"""The second KV pool on the device: the draft forward reads and writes only it."""

from __future__ import annotations

import torch

from sglang_vericache.kernels.pool_format import PoolFormat, PoolStorage
from sglang_vericache.pool.allocator import SlotAllocator


class DraftPool:
    """Storage and free slots, and the face of SGLang's KVCache that model code asks for.

    Models that fuse rotary embedding with the KV store fetch the ambient pool's buffers through
    ``get_key_buffer``; others hand K and V to the attention backend. Both end up here.
    """

    def __init__(
        self,
        pool_format: PoolFormat,
        layers: int,
        slots: int,
        heads: int,
        head_dim: int,
        device: torch.device | str,
    ) -> None:
        self.storage = PoolStorage(pool_format, layers, slots, heads, head_dim, device)
        self.allocator = SlotAllocator(slots, device)
        self.device = device
        self.page_size = 1
        # Model code compares this with bfloat16 before it writes into our buffers directly.
        self.dtype = getattr(pool_format, "dtype", torch.uint8)

    @property
    def slots(self) -> int:
        return self.storage.slots

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.storage.tensors["keys"][layer_id]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.storage.tensors["values"][layer_id]

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)
