"""The main pool's buffers of all layers, for kernels that serve all layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LayerBuffers(Sequence[torch.Tensor]):
    """Tensors ``[S, H, D]``, one a layer, and their addresses on the device.

    Built once and passed in place of a list of tensors, which would be turned into one, with a
    copy to the device, at every call. A slice is LayerBuffers of some layers, without a copy.

    Args:
        buffers: of one shape, dtype, device and layout; the last two dimensions are contiguous.

    Attributes:
        pointers: ``[layers]`` int64 addresses, on the device of the buffers.
        slot_stride: elements from one slot to the next.
        alignment: bytes that divide every address, at most 16.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        first = buffers[0]
        if first.dim() != 3 or first.stride()[1:] != (first.shape[2], 1):
            raise ValueError("a layer's buffer must be [S, H, D] with contiguous heads")
        for layer, buffer in enumerate(buffers):
            if _layout(buffer) != _layout(first):
                raise ValueError(f"buffers of layers 0 and {layer} differ in shape or layout")
        addresses = [buffer.data_ptr() for buffer in buffers]
        alignment = min(16, *(address & -address for address in addresses))
        pointers = torch.tensor(addresses, dtype=torch.int64, device=first.device)
        self._set(list(buffers), pointers, alignment)

    def _set(self, buffers: list[torch.Tensor], pointers: torch.Tensor, alignment: int) -> None:
        self._buffers, self.pointers, self.alignment = buffers, pointers, alignment
        self.slot_stride = buffers[0].stride(0) if buffers else 0

    @classmethod
    def of(cls, buffers: Sequence[torch.Tensor]) -> LayerBuffers:
        """``buffers`` themselves where they are LayerBuffers already."""
        return buffers if isinstance(buffers, LayerBuffers) else cls(buffers)

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return self._buffers[index]
        some = object.__new__(LayerBuffers)
        some._set(self._buffers[index], self.pointers[index], self.alignment)
        return some

    def __len__(self) -> int:
        return len(self._buffers)


def _layout(buffer: torch.Tensor) -> tuple:
    return buffer.shape, buffer.stride(), buffer.dtype, buffer.device
