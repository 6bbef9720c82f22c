"""gather_span and regather_span against explicit loops over layers, heads and rows."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache.kernels.gather_span import gather_span, regather_span
from sglang_vericache.kernels.pool_format import DenseFormat, PoolStorage

LAYERS, HEADS, DIM = 3, 2, 5
MAIN_SLOTS, DRAFT_SLOTS = 60, 80
SHAPES = pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (7, 3), (33, 33), (40, 11)], ids=["one", "few", "all", "some"]
)


def new_storage(dtype: torch.dtype = torch.float32) -> PoolStorage:
    """A draft pool full of numbers, so that rows left alone can be told from rows written."""
    storage = PoolStorage(DenseFormat(dtype), LAYERS, DRAFT_SLOTS, HEADS, DIM, "cpu")
    for tensor in storage.tensors.values():
        tensor.copy_(torch.randn(tensor.shape))
    return storage


def copies(storage: PoolStorage) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in storage.tensors.items()}


def random_picks(tokens: int, rows: int) -> torch.Tensor:
    """``[L, H, rows]``, ascending, different for each layer and head."""
    scores = torch.rand(LAYERS, HEADS, tokens)
    return scores.topk(rows, dim=2).indices.sort(dim=2).values


def main_pool(dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    keys, values = torch.randn(2, LAYERS, MAIN_SLOTS, HEADS, DIM).to(dtype)
    return list(keys), list(values)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gather(tokens, rows, dtype):
    """Catches heads or layers that get each other's picks, indices taken for slots, rows out of
    order, and writes outside the target slots."""
    keys, values = main_pool(dtype)
    storage = new_storage(dtype)
    wanted = copies(storage)
    source = torch.randperm(MAIN_SLOTS)[:tokens]
    target = torch.randperm(DRAFT_SLOTS)[:rows] + 1
    picks = random_picks(tokens, rows)
    for layer in range(LAYERS):
        for head in range(HEADS):
            for row in range(rows):
                slot = source[picks[layer, head, row]]
                wanted["keys"][layer, target[row], head] = keys[layer][slot, head]
                wanted["values"][layer, target[row], head] = values[layer][slot, head]
    gather_span(keys, values, source, picks, storage, target)
    for name, tensor in storage.tensors.items():
        assert torch.equal(tensor, wanted[name]), name


@SHAPES
def test_regather(tokens, rows):
    """The same mistakes, where source and target lie in one pool. The two are disjoint: a fold
    takes new slots before it gives the old ones back. The source must stay as it is, because the
    draft view is switched to the new span only afterwards."""
    storage = new_storage()
    wanted = copies(storage)
    slots = torch.randperm(DRAFT_SLOTS) + 1
    source, target = slots[:tokens], slots[tokens : tokens + rows]
    picks = random_picks(tokens, rows)
    for tensor in wanted.values():
        for layer in range(LAYERS):
            for head in range(HEADS):
                for row in range(rows):
                    slot = source[picks[layer, head, row]]
                    tensor[layer, target[row], head] = tensor[layer, slot, head]
    regather_span(storage, source, picks, target)
    for name, tensor in storage.tensors.items():
        assert torch.equal(tensor, wanted[name]), name


def test_regather_moves_encoded_rows_unchanged():
    """Catches a decode and encode on the way, which would lose a little with every fold."""
    storage = new_storage(torch.bfloat16)
    bits = storage.tensors["keys"].view(torch.int16)
    bits[:, 3] = 0x7FC1  # a not-a-number whose payload no arithmetic keeps
    regather_span(
        storage,
        torch.tensor([3]),
        torch.zeros(LAYERS, HEADS, 1, dtype=torch.int64),
        torch.tensor([8]),
    )
    assert (bits[:, 8] == 0x7FC1).all()
