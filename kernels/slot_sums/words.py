"""What is summed: a token's bytes as whole numbers, each with a weight of its own.

The sum is modulo 2^64, and the weights are odd: no change of a single word leaves it as it was.
They differ from word to word and from layer to layer: words, heads or layers that change places
change it as well. Tokens have a sum each, so tokens that change places do too.
"""

from __future__ import annotations

import torch

from sglang_vericache.kernels.layer_buffers import LayerBuffers

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_SEED = 20_260_000


def word_dtype(buffers: LayerBuffers) -> torch.dtype:
    """The largest whole number that a row of these buffers consists of, and may be read as."""
    first = buffers[0]
    row_bytes = first[0].numel() * first.element_size()
    stride_bytes = buffers.slot_stride * first.element_size()
    return next(
        dtype
        for size, dtype in _WORDS.items()
        if not any(bytes % size for bytes in (row_bytes, stride_bytes, buffers.alignment))
    )


def new_weights(buffers: LayerBuffers) -> torch.Tensor:
    """``[layers, W]`` odd int64, the same for buffers of the same shape."""
    first = buffers[0]
    row_bytes = first[0].numel() * first.element_size()
    words = row_bytes // word_dtype(buffers).itemsize
    generator = torch.Generator().manual_seed(_SEED)
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    weights = torch.randint(
        lowest, highest, (len(buffers), words), dtype=torch.int64, generator=generator
    )
    return (weights | 1).to(first.device)
