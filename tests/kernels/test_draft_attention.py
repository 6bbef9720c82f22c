"""draft_attention against softmax(q k) v in float64, one query and head at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from pools import DEVICE, Views, views

from sglang_vericache.kernels.draft_attention import draft_attention
from sglang_vericache.kernels.pool_format import DenseFormat

# float32 sums over at most 128 dimensions and 150 rows, outputs of size 1.
FLOAT32_TOLERANCE = 5e-6
# The inputs are the same bfloat16 numbers on both sides; only the output is rounded (8 bits).
BFLOAT16_TOLERANCE = 2**-8
# Of a capped score on a device, as a share of the cap. There tanh(x) is 2 sigmoid(2 x) - 1 by
# ex2.approx and div.full, each two units in the last place off at most: with the sum between them
# 4 * 2^-24 of a sigmoid, twice that of the tanh. An output of size 1 moves by as much as scores.
DEVICE_TANH_ERROR = 2**-21


@dataclass
class Case:
    """Queries over views; not-a-number in every slot outside the views."""

    query: torch.Tensor
    views: Views
    scaling: float
    logit_cap: float = 0.0
    layer: int = 1

    def run(self) -> np.ndarray:
        output = draft_attention(
            self.query,
            self.views.storage,
            self.layer,
            self.views.row_table,
            self.views.rows,
            self.views.lengths,
            self.scaling,
            self.logit_cap,
        )
        assert (output.shape, output.dtype) == (self.query.shape, self.query.dtype)
        return output.double().cpu().numpy()

    def formula(self) -> np.ndarray:
        stored = self.views.storage.tensors
        keys = stored["keys"][self.layer].double().cpu().numpy()
        values = stored["values"][self.layer].double().cpu().numpy()
        query = self.query.double().cpu().numpy()
        batch, queries, query_heads, _ = query.shape
        group = query_heads // keys.shape[1]
        output = np.zeros(query.shape)
        for b in range(batch):
            slots = self.views.slots(b).tolist()
            for i in range(queries):
                # The queries are the last tokens of the view; each sees those up to itself.
                seen = slots[: max(0, len(slots) - (queries - 1 - i))]
                for h in range(query_heads if seen else 0):
                    logits = self.scaling * keys[seen, h // group] @ query[b, i, h]
                    if self.logit_cap:
                        logits = self.logit_cap * np.tanh(logits / self.logit_cap)
                    weights = np.exp(logits - logits.max())
                    output[b, i, h] = weights / weights.sum() @ values[seen, h // group]
        return output


def make(
    lengths: list[int],
    queries: int = 1,
    heads: int = 2,
    group: int = 2,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Case:
    query = torch.randn(len(lengths), queries, heads * group, dim).to(DEVICE, dtype)
    return Case(query, views(DenseFormat(dtype), lengths, heads, dim), dim**-0.5)


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_sizes_and_groups(dim, group):
    """Catches query heads that read another head's keys, and sizes that are no power of two."""
    case = make([37, 1, 150], dim=dim, group=group, heads=2)
    np.testing.assert_allclose(case.run(), case.formula(), atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize(
    "lengths",
    [[5], [5, 6, 7], [90, 5, 33], [64, 64], [20, 0, 7, 0]],
    ids=["one", "ragged", "mixed", "even", "padded"],
)
def test_queries_see_up_to_themselves(lengths, queries):
    """Catches a causal mask that is one off or aligned with the start of the view instead of its
    end, masks shared by requests of different lengths, and not-a-number from beyond the end: zero
    weight times not-a-number is not zero. Rows that pad a batch have no tokens: zeros."""
    case = make(lengths, queries=queries)
    found = case.run()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, case.formula(), atol=FLOAT32_TOLERANCE)


def test_bfloat16():
    """Catches sums in half precision, and an output in another dtype than the query's."""
    case = make([120, 43], queries=2, dtype=torch.bfloat16)
    wanted = case.formula()
    np.testing.assert_allclose(case.run(), wanted, atol=BFLOAT16_TOLERANCE, rtol=BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_logit_cap(cap):
    """Catches a cap that is applied before the scale, or after the mask."""
    case = replace(make([50, 20], queries=3), logit_cap=cap, scaling=1.0)
    found = case.run()
    tolerance = FLOAT32_TOLERANCE + (cap * DEVICE_TANH_ERROR if DEVICE == "cuda" else 0.0)
    np.testing.assert_allclose(found, case.formula(), atol=tolerance)
    uncapped = replace(case, logit_cap=0.0).formula()
    assert np.abs(found - uncapped).max() > 1000 * tolerance, "the cap does nothing here"


def test_scaling():
    """Catches a scale of its own: models give theirs."""
    case = replace(make([50]), scaling=0.7)
    np.testing.assert_allclose(case.run(), case.formula(), atol=FLOAT32_TOLERANCE)


def test_layer():
    """Catches a layer that is always the first: layer 0 holds not-a-number only."""
    case = make([20])
    assert np.isfinite(case.run()).all()
    assert np.isnan(replace(case, layer=0).run()).all()


def test_single_token_returns_its_value():
    """Catches a softmax that is not one over one token."""
    case = make([1], heads=2, group=3)
    value = case.views.storage.tensors["values"][1, case.views.slots(0)[0]]
    wanted = value.repeat_interleave(3, dim=0)[None, None].cpu().numpy()
    np.testing.assert_allclose(case.run(), wanted, atol=FLOAT32_TOLERANCE)


def test_order_of_rows_carries_no_meaning():
    """Catches positions derived from rows: a span's rows hold different tokens for each head."""
    case = make([40], queries=2)
    shuffled = case.views.row_table.clone()
    row = case.views.rows[0]
    shuffled[row, :38] = shuffled[row, torch.randperm(38)]
    found = replace(case, views=replace(case.views, row_table=shuffled)).run()
    np.testing.assert_allclose(found, case.formula(), atol=FLOAT32_TOLERANCE)


def test_order_of_requests():
    """Catches rows taken by place in the batch instead of by request."""
    case = make([10, 30, 20])
    order = torch.tensor([2, 0, 1])
    rows, lengths = case.views.rows[order], case.views.lengths[order]
    permuted = replace(
        case, query=case.query[order], views=replace(case.views, rows=rows, lengths=lengths)
    )
    np.testing.assert_allclose(permuted.run(), case.formula()[order], atol=FLOAT32_TOLERANCE)


def test_nothing_is_written():
    """Catches masking in place of the pool: its slots belong to others."""
    case = make([10, 30])
    storage = case.views.storage
    before = {name: tensor.clone() for name, tensor in storage.tensors.items()}
    query, table = case.query.clone(), case.views.row_table.clone()
    case.run()
    for name, tensor in storage.tensors.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
    assert torch.equal(case.query, query) and torch.equal(case.views.row_table, table)
