"""Sums of tokens in one launch, without memory of its own.

Grid: (blocks of tokens). A program reads its tokens layer by layer, and the weights once for all of
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.slot_sums.words import word_dtype

_WORD_TYPES = {
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.int16: tl.int16,
    torch.uint8: tl.uint8,
}
# 8 tokens of 1 KiB in registers at a time.
_BLOCK_TOKENS, _MOST_WORDS = 8, 128


# Slots are slices of longer tensors, at any address: not a kernel for each alignment, which the
# first launch would compile while requests wait.
@triton.jit(
    do_not_specialize=["count", "layers"],
    do_not_specialize_on_alignment=["slots", "places", "changed"],
)
def slot_sums_kernel(
    pointers,  # [layers] int64
    weights,  # [layers, WORDS] int64
    slots,  # [count] int64
    sums,  # [P] int64
    places,  # [count] int64
    changed,  # [1] int32
    count,
    layers,
    slot_words,  # from one slot to the next
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    COMPARE: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    valid = token < count
    slot = tl.load(slots + token, mask=valid, other=0).to(tl.int64)
    total = tl.zeros([BLOCK_TOKENS], dtype=tl.int64)
    for layer in range(layers):
        buffer = tl.load(pointers + layer).to(tl.pointer_type(WORD))
        for first in range(0, WORDS, BLOCK_WORDS):
            word = first + tl.arange(0, BLOCK_WORDS)
            weight = tl.load(weights + layer * WORDS + word, mask=word < WORDS, other=0)
            mask = valid[:, None] & (word < WORDS)[None, :]
            at = (slot * slot_words)[:, None] + word[None, :]
            rows = tl.load(buffer + at, mask=mask, other=0)
            total += tl.sum(rows.to(tl.int64) * weight[None, :], axis=1)
    place = tl.load(places + token, mask=valid, other=0)
    if COMPARE:
        known = tl.load(sums + place, mask=valid, other=0)
        different = tl.sum((valid & (known != total)).to(tl.int32), axis=0)
        tl.atomic_add(changed, different)
    else:
        tl.store(sums + place, total, mask=valid)


def slot_sums(
    buffers: LayerBuffers,
    weights: torch.Tensor,
    slots: torch.Tensor,
    sums: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """As `reference.slot_sums`."""
    _launch(buffers, weights, slots, sums, places, None)


def count_changed(
    buffers: LayerBuffers,
    weights: torch.Tensor,
    slots: torch.Tensor,
    sums: torch.Tensor,
    places: torch.Tensor,
    changed: torch.Tensor,
) -> None:
    """As `reference.count_changed`."""
    _launch(buffers, weights, slots, sums, places, changed)


def _launch(buffers, weights, slots, sums, places, changed) -> None:
    count = slots.numel()
    if count == 0:
        return
    dtype = word_dtype(buffers)
    slot_bytes = buffers.slot_stride * buffers[0].element_size()
    words = weights.shape[1]
    slot_sums_kernel[(triton.cdiv(count, _BLOCK_TOKENS),)](
        pointers=buffers.pointers,
        weights=weights,
        slots=slots,
        sums=sums,
        places=places,
        changed=sums if changed is None else changed,
        count=count,
        layers=len(buffers),
        slot_words=slot_bytes // dtype.itemsize,
        WORD=_WORD_TYPES[dtype],
        WORDS=words,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_WORDS=min(_MOST_WORDS, triton.next_power_of_2(words)),
        COMPARE=changed is not None,
    )
