"""merge_states against attention over the whole context, in float64."""

from __future__ import annotations

import pytest
import torch
from pools import DEVICE

from sglang_vericache.kernels.merge_states import merge_states

QUERIES, HEADS = 7, 3


def part(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor):
    """Attention over some tokens, and the base-2 logarithm of its sum of weights."""
    scores = torch.einsum("qhd,khd->qhk", query, keys)
    lse = torch.logsumexp(scores, -1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    weights = scores.softmax(-1).nan_to_num() if len(keys) else scores
    return torch.einsum("qhk,khd->qhd", weights, values), lse


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("cut", [0, 1, 20, 29, 30], ids=lambda cut: f"{cut}-of-30")
def test_two_parts_are_the_whole(dim, dtype, tolerance, cut):
    """Catches logarithms to another base, a part without tokens that counts, rows mixed up."""
    query = torch.randn(QUERIES, HEADS, dim, dtype=torch.float64) * 0.4
    keys, values = torch.randn(2, 30, HEADS, dim, dtype=torch.float64)
    wanted, _ = part(query, keys, values)
    one, one_lse = part(query, keys[:cut], values[:cut])
    two, two_lse = part(query, keys[cut:], values[cut:])
    output, other = (state.to(DEVICE, dtype).contiguous() for state in (one, two))
    lse, other_lse = (state.float().to(DEVICE).contiguous() for state in (one_lse, two_lse))
    kept = other.clone()
    merge_states(output, lse, other, other_lse)
    assert torch.allclose(output.double().cpu(), wanted, atol=tolerance, rtol=tolerance)
    assert torch.equal(other, kept)


def test_weights_far_apart():
    """Catches sums of weights that overflow: logarithms of long contexts reach hundreds."""
    one, two = torch.ones(2, 1, 64), torch.full((2, 1, 64), 3.0)
    lse, other_lse = torch.tensor([[900.0], [-900.0]]), torch.tensor([[-900.0], [-900.0]])
    output = one.to(DEVICE)
    merge_states(output, lse.to(DEVICE), two.to(DEVICE), other_lse.to(DEVICE))
    assert output[0].unique().tolist() == [1.0]
    assert output[1].unique().tolist() == [2.0]


def test_nothing_to_read():
    """Catches a number that is none, where neither part has tokens: padding."""
    output = torch.zeros(1, 1, 64, device=DEVICE)
    nothing = torch.full((1, 1), -torch.inf, device=DEVICE)
    merge_states(output, nothing, output.clone(), nothing)
    assert output.eq(0).all()


def test_no_queries():
    empty = torch.zeros(0, HEADS, 64, device=DEVICE)
    merge_states(empty, empty[..., 0], empty.clone(), empty[..., 0])
