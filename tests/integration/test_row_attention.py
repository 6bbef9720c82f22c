"""Verify passes by the draft steps' kernel against plain causal attention in float64."""

from __future__ import annotations

from types import SimpleNamespace

import cpu_engine
import numpy as np
import pytest
import torch

cpu_engine.required()

from verify_batch import LAYERS, NAMES, SIZES, TOLERANCE, Batch  # noqa: E402

from sglang_vericache.config import TRITON, VeriCacheConfig  # noqa: E402
from sglang_vericache.verify.row_attention import (  # noqa: E402
    RowAttention,
    RowPlan,
    create_row_attention,
)


def attention_for(batch: Batch) -> RowAttention:
    table = SimpleNamespace(req_to_token=batch.table, size=len(batch.lengths))
    query_heads = batch.heads * batch.group
    return RowAttention(batch.pool, table, LAYERS, query_heads, table.size, batch.width)


def run(batch: Batch, **changes) -> np.ndarray:
    batch.layer.logit_cap = 0.0
    attention = attention_for(batch)
    attention.init_forward_metadata(batch.forward)
    given = batch.q, batch.k.flatten(1), batch.v.flatten(1), batch.layer, batch.forward
    output = attention.forward_extend(*given, **changes)
    assert output.shape == batch.q.shape
    return output.double().numpy()


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("lengths", "width"), SIZES, ids=NAMES)
def test_equals_causal_attention(lengths, width, group):
    """Catches a causal mask that is off, lengths without the tokens being verified, kv heads shared
    by the wrong query heads, another layer's keys, and requests mixed up."""
    batch = Batch(lengths, width, heads=2, group=group)
    found = run(batch)
    np.testing.assert_allclose(found, batch.formula(), atol=TOLERANCE)


def test_the_exact_kv_is_written():
    """Catches keys and values of verified tokens that are missing from the main pool, or written
    over another layer's: the next steps read them as exact."""
    batch = Batch([9, 3], 4, heads=2, group=2)
    other = batch.pool.get_key_buffer(0).clone()
    run(batch)
    assert torch.equal(batch.pool.get_key_buffer(1)[batch.written], batch.k)
    assert torch.equal(batch.pool.get_value_buffer(1)[batch.written], batch.v)
    assert torch.equal(batch.pool.get_key_buffer(0), other)


def test_without_saving_nothing_is_written():
    """Catches a flag that is ignored: some models write their keys themselves."""
    batch = Batch([9, 3], 4, heads=2, group=2)
    before = batch.pool.get_key_buffer(1).clone()
    found = run(batch, save_kv_cache=False)
    assert torch.equal(batch.pool.get_key_buffer(1), before)
    np.testing.assert_allclose(found, batch.formula(), atol=TOLERANCE)


def test_a_captured_pass_takes_its_lengths_from_the_device():
    """Catches a plan that keeps the lengths of the pass it was captured with."""
    batch = Batch([20, 6], 3, heads=2, group=2)
    attention = attention_for(batch)
    plan = RowPlan(attention, batch.width)
    committed = torch.zeros(2, dtype=torch.int64)
    plan.plan(())
    plan.fill_indices(batch.table, batch.rows, committed)
    assert plan.metadata is not None and plan.metadata.lengths.tolist() == [3, 3]
    committed.copy_(torch.tensor([20, 6]))
    plan.plan([20, 6])
    plan.fill_indices(batch.table, batch.rows, committed)
    attention.forward_metadata = plan.metadata
    batch.layer.logit_cap = 0.0
    found = attention.forward_extend(
        batch.q, batch.k.flatten(1), batch.v.flatten(1), batch.layer, batch.forward
    )
    np.testing.assert_allclose(found.double().numpy(), batch.formula(), atol=TOLERANCE)
    assert plan.fits([1 << 40])


def test_it_is_made_only_where_it_is_wanted():
    batch = Batch([9], 4, heads=2, group=2)
    table = SimpleNamespace(req_to_token=batch.table, size=1)
    assert create_row_attention(VeriCacheConfig(), batch.pool, table, LAYERS, 4) is None
    wanted = VeriCacheConfig(verify_attention=TRITON)
    assert create_row_attention(wanted, batch.pool, table, LAYERS, 4) is not None
