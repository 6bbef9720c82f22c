"""gather_span and regather_span against explicit loops over layers, heads and rows."""

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

from sglang_vericache.kernels.gather_span import gather_span, regather_span
from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.pool_format import DenseFormat, Int4Format, PoolStorage

LAYERS, HEADS, DIM = 3, 2, 5
MAIN_SLOTS, DRAFT_SLOTS = 60, 80
SHAPES = pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (7, 3), (33, 33), (40, 11)], ids=["one", "few", "all", "some"]
)


def random_picks(tokens: int, rows: int, heads: int = HEADS) -> torch.Tensor:
    """``[L, heads, rows]``, ascending, different for each layer and head."""
    scores = torch.rand(LAYERS, heads, tokens)
    return scores.topk(rows, dim=2).indices.sort(dim=2).values.to(DEVICE)


def gather_in_a_loop(keys, values, source, picks, storage: PoolStorage, target) -> None:
    for layer in range(LAYERS):
        for head in range(storage.heads):
            for index, slot in enumerate(target.tolist()):
                token = source[picks[layer, head, index]]
                encoded = storage.format.encode(
                    keys[layer][token, head], values[layer][token, head]
                )
                for name, numbers in encoded.items():
                    storage.tensors[name][layer, slot, head] = numbers


def regather_in_a_loop(storage: PoolStorage, source, picks, target) -> None:
    for tensor in storage.tensors.values():
        for layer in range(LAYERS):
            for head in range(storage.heads):
                for row, slot in enumerate(target.tolist()):
                    moved = tensor[layer, source[picks[layer, head, row]], head]
                    tensor[layer, slot, head] = moved


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gather(tokens, rows, dtype):
    """Catches heads or layers that get each other's picks, indices taken for slots, rows out of
    order, and writes outside the target slots."""
    keys, values = main_pool(LAYERS, MAIN_SLOTS, HEADS, DIM, dtype)
    storage = filled_storage(DenseFormat(dtype), LAYERS, DRAFT_SLOTS, HEADS, DIM)
    wanted = twin(storage)
    source = torch.randperm(MAIN_SLOTS)[:tokens].to(DEVICE)
    target = (torch.randperm(DRAFT_SLOTS)[:rows] + 1).to(DEVICE)
    picks = random_picks(tokens, rows)
    gather_in_a_loop(keys, values, source, picks, wanted, target)
    gather_span(keys, values, source, picks, storage, target)
    assert_same_bits(storage, wanted)


@ALL_FORMATS
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (1, 80), (2, 128)])
def test_gather_formats(pool_format, heads, dim):
    """The same mistakes in formats that encode, with more rows than one program moves."""
    keys, values = main_pool(LAYERS, MAIN_SLOTS, heads, dim, model_dtype(pool_format))
    storage = filled_storage(pool_format, LAYERS, DRAFT_SLOTS, heads, dim)
    wanted = twin(storage)
    source = torch.randperm(MAIN_SLOTS)[:40].to(DEVICE)
    target = (torch.randperm(DRAFT_SLOTS)[:13] + 1).to(DEVICE)
    picks = random_picks(40, 13, heads)
    gather_in_a_loop(keys, values, source, picks, wanted, target)
    gather_span(LayerBuffers(keys), LayerBuffers(values), source, picks, storage, target)
    assert_same_bits(storage, wanted)


@SHAPES
def test_regather(tokens, rows):
    """The same mistakes, where source and target lie in one pool. The two are disjoint: a fold
    takes new slots before it gives the old ones back. The source must stay as it is, because the
    draft view is switched to the new span only afterwards."""
    storage = filled_storage(DenseFormat(torch.float32), LAYERS, DRAFT_SLOTS, HEADS, DIM)
    wanted = twin(storage)
    slots = (torch.randperm(DRAFT_SLOTS) + 1).to(DEVICE)
    source, target = slots[:tokens], slots[tokens : tokens + rows]
    picks = random_picks(tokens, rows)
    regather_in_a_loop(wanted, source, picks, target)
    regather_span(storage, source, picks, target)
    assert_same_bits(storage, wanted)


@ALL_FORMATS
def test_regather_formats(pool_format):
    """Catches a tensor of a format that stays behind: codes without their scales."""
    storage = filled_storage(pool_format, LAYERS, DRAFT_SLOTS, 3, 64)
    wanted = twin(storage)
    slots = (torch.randperm(DRAFT_SLOTS) + 1).to(DEVICE)
    picks = random_picks(30, 17, heads=3)
    regather_in_a_loop(wanted, slots[:30], picks, slots[30:47])
    regather_span(storage, slots[:30], picks, slots[30:47])
    assert_same_bits(storage, wanted)


@pytest.mark.parametrize(
    ("pool_format", "bits"),
    # Not-a-number whose payload no arithmetic keeps, as a key or as a scale.
    [(DenseFormat(torch.bfloat16), 0x7FC1), (Int4Format(), 0x7E01)],
    ids=["bf16", "int4"],
)
def test_regather_moves_encoded_rows_unchanged(pool_format, bits):
    """Catches a decode and encode on the way, which would lose a little with every fold."""
    storage = filled_storage(pool_format, LAYERS, DRAFT_SLOTS, HEADS, 16)
    for tensor in storage.tensors.values():
        tensor.view(torch.int16)[:, 3] = bits
    regather_span(
        storage,
        torch.tensor([3], device=DEVICE),
        torch.zeros(LAYERS, HEADS, 1, dtype=torch.int64, device=DEVICE),
        torch.tensor([8], device=DEVICE),
    )
    for tensor in storage.tensors.values():
        assert (tensor.view(torch.int16)[:, 8] == bits).all()


def test_nothing_picked():
    """Catches a launch of nothing, which CUDA refuses."""
    keys, values = main_pool(LAYERS, MAIN_SLOTS, HEADS, DIM, torch.float32)
    storage = filled_storage(DenseFormat(torch.float32), LAYERS, DRAFT_SLOTS, HEADS, DIM)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    picks = torch.zeros(LAYERS, HEADS, 0, dtype=torch.int64, device=DEVICE)
    source = torch.arange(5, device=DEVICE)
    gather_span(keys, values, source, picks, storage, none)
    regather_span(storage, source, picks, none)
