"""slot_sums against Python's whole numbers, and against everything that may happen to a copy."""

from __future__ import annotations

import pytest
import torch
from pools import DEVICE, main_pool

from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.slot_sums import count_changed, new_weights, slot_sums

LAYERS, SLOTS, HEADS, DIM = 2, 60, 2, 20
SEALED = list(range(5, 50))


def buffers_of(dtype: torch.dtype, heads: int = HEADS, dim: int = DIM) -> LayerBuffers:
    keys, values = main_pool(LAYERS, SLOTS, heads, dim, dtype)
    return LayerBuffers(keys + values)


def slots(numbers) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device=DEVICE)


class Sealed:
    """Tokens whose sums are known, at places in another order."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.buffers = buffers_of(dtype)
        self.weights = new_weights(self.buffers)
        self.sums = torch.zeros(SLOTS, dtype=torch.int64, device=DEVICE)
        self.slots, self.places = slots(SEALED), slots(reversed(SEALED))
        slot_sums(self.buffers, self.weights, self.slots, self.sums, self.places)

    @property
    def changed(self) -> int:
        found = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        count_changed(self.buffers, self.weights, self.slots, self.sums, self.places, found)
        return int(found)


@pytest.mark.parametrize(
    ("dtype", "heads", "dim", "word_bytes"),
    [
        pytest.param(torch.float32, 1, 4, 8, id="8-bytes"),
        pytest.param(torch.bfloat16, 8, 128, 8, id="more-words-than-a-block"),
        pytest.param(torch.bfloat16, 1, 6, 4, id="4-bytes"),
        pytest.param(torch.float16, 3, 5, 2, id="2-bytes"),
        pytest.param(torch.uint8, 1, 63, 1, id="1-byte"),
    ],
)
def test_against_whole_numbers(dtype, heads, dim, word_bytes):
    """Catches words, layers or tokens left out, and a sum that overflows in another way."""
    if dtype is torch.uint8:
        buffers = LayerBuffers([torch.randint(0, 256, (SLOTS, heads, dim), dtype=dtype).to(DEVICE)])
    else:
        buffers = buffers_of(dtype, heads, dim)
    weights = new_weights(buffers)
    chosen, places = [7, 0, SLOTS - 1, 8, 9, 52, 41, 42, 43], [1, 5, 2, 30, 4, 3, 8, 9, 10]
    sums = torch.full((40,), -7, dtype=torch.int64, device=DEVICE)
    slot_sums(buffers, weights, slots(chosen), sums, slots(places))
    for slot, place in zip(chosen, places, strict=True):
        wanted = 0
        for buffer, layer_weights in zip(buffers, weights.tolist(), strict=True):
            row = bytes(buffer[slot].cpu().contiguous().flatten().view(torch.uint8).tolist())
            words = [row[at : at + word_bytes] for at in range(0, len(row), word_bytes)]
            for word, weight in zip(words, layer_weights, strict=True):
                assert weight % 2
                wanted += int.from_bytes(word, "little", signed=word_bytes > 1) * weight
        assert int(sums[place]) % 2**64 == wanted % 2**64
    assert sums.eq(-7).sum() == 40 - len(chosen), "a sum was written to another place"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_single_bit_counts(dtype):
    """Catches a weight that forgets the highest bits of its word."""
    sealed = Sealed(dtype)
    assert sealed.changed == 0
    for layer in range(2 * LAYERS):
        row = sealed.buffers[layer][17].view(torch.uint8)
        for head, byte, bit in ((0, 0, 0), (1, row.shape[1] - 1, 7)):
            row[head, byte] ^= 1 << bit
            assert sealed.changed == 1, (layer, head, byte, bit)
            row[head, byte] ^= 1 << bit
    assert sealed.changed == 0


def test_what_changes_places():
    """Catches a sum that does not look at the order of rows, layers, heads, keys and values."""
    sealed = Sealed()
    for what, first, second in (
        ("rows", sealed.buffers[0][20], sealed.buffers[0][21]),
        ("layers", sealed.buffers[0][20], sealed.buffers[1][20]),
        ("keys and values", sealed.buffers[0][20], sealed.buffers[LAYERS][20]),
        ("heads", sealed.buffers[0][20, 0], sealed.buffers[0][20, 1]),
        ("numbers", sealed.buffers[0][20, 0, 3:4], sealed.buffers[0][20, 0, 4:5]),
    ):
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        assert sealed.changed == (2 if what == "rows" else 1), what
        second.copy_(first)
        first.copy_(kept)
        assert sealed.changed == 0


def test_whole_tokens_that_change_places():
    """Catches one sum for several tokens."""
    sealed = Sealed()
    for buffer in sealed.buffers:
        buffer[[20, 21]] = buffer[[21, 20]]
    assert sealed.changed == 2


def test_a_copy_that_ended_early():
    """Catches a check that stops where the copy did."""
    sealed = Sealed()
    sealed.buffers[2 * LAYERS - 1][40:] = 0
    assert sealed.changed == len([slot for slot in SEALED if slot >= 40])


def test_nothing_to_sum():
    sealed = Sealed()
    slot_sums(sealed.buffers, sealed.weights, slots([]), sealed.sums, slots([]))
    assert sealed.changed == 0


def test_buffers_with_gaps():
    """Catches a pool whose slots are assumed to touch."""
    together = torch.randn(SLOTS, 2, HEADS, DIM, device=DEVICE)
    apart = LayerBuffers([together[:, 0]])
    dense = LayerBuffers([together[:, 0].contiguous()])
    found = torch.zeros(2, SLOTS, dtype=torch.int64, device=DEVICE)
    for row, buffers in zip(found, (apart, dense), strict=True):
        slot_sums(buffers, new_weights(buffers), slots(SEALED), row, slots(SEALED))
    assert torch.equal(*found)
