"""What verify passes by the draft steps' kernel need beside their arithmetic."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import cpu_engine
import numpy as np
import pytest
import torch

cpu_engine.required()

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention  # noqa: E402
from verify_batch import LAYERS, TOLERANCE, Batch, row_attention_for  # noqa: E402

from sglang_vericache.config import (  # noqa: E402
    AUTO,
    TRITON,
    VeriCacheConfig,
    VeriCacheConfigError,
)
from sglang_vericache.verify import row_attention  # noqa: E402
from sglang_vericache.verify.row_attention import (  # noqa: E402
    RowPlan,
    create_row_attention,
    is_preferred,
    too_wide,
    unserved_layer,
)


def test_a_captured_pass_takes_its_lengths_from_the_device():
    """Catches a plan that keeps the lengths of the pass it was captured with."""
    batch = Batch([20, 6], 3, heads=2, group=2)
    attention = row_attention_for(batch)
    plan = RowPlan(attention, batch.width)
    committed = torch.zeros(2, dtype=torch.int64)
    plan.plan(())
    plan.fill_indices(batch.table, batch.rows, committed)
    assert plan.metadata is not None and plan.metadata.lengths.tolist() == [3, 3]
    committed.copy_(torch.tensor([20, 6]))
    plan.plan([20, 6])
    plan.fill_indices(batch.table, batch.rows, committed)
    attention.forward_metadata = plan.metadata
    found = attention.forward_extend(batch.q, batch.k, batch.v, batch.layer, batch.forward)
    np.testing.assert_allclose(found.double().numpy(), batch.formula(), atol=TOLERANCE)
    assert plan.fits([1 << 40])


@pytest.mark.parametrize("choice", [AUTO, TRITON])
def test_it_is_made_where_the_widest_pass_fits(monkeypatch, choice):
    """Catches a server that cannot start because of a kernel that nobody asked for, and one that
    starts without the kernel that was asked for."""
    batch = Batch([9], 4, heads=2, group=2)
    table = SimpleNamespace(req_to_token=batch.table, size=1)
    config = VeriCacheConfig(verify_attention=choice)
    given = config, torch.nn.Module(), batch.pool, table, range(LAYERS), 4
    assert create_row_attention(*given) is not None
    monkeypatch.setattr(row_attention, "most_query_rows", lambda storage: 16)
    if choice == AUTO:
        assert create_row_attention(*given) is None
        return
    with pytest.raises(VeriCacheConfigError, match="backend serves any"):
        create_row_attention(*given)


def radix_attention() -> RadixAttention:
    return RadixAttention(4, 16, 0.25, num_kv_heads=2, layer_id=0)


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("xai_temperature_len", 1024, "a temperature"),
        ("use_irope", True, "chunks"),
        ("is_cross_attention", True, "keys of an encoder"),
        ("attn_type", AttentionType.ENCODER_ONLY, "the mask of encoder_only attention"),
        ("v_head_dim", 8, "values of another size"),
        ("k_scale_float", 0.5, "scaled keys"),
        ("sinks", torch.nn.Parameter(torch.zeros(2)), "sinks"),
    ],
)
def test_layers_that_the_kernel_does_not_compute(attribute, value, said):
    """Catches tokens of another formula than the model's, by default."""
    layers = torch.nn.ModuleList([radix_attention(), radix_attention()])
    layers[0].k_scale_float = 1.0
    assert unserved_layer(layers) is None
    setattr(layers[1], attribute, value)
    problem = unserved_layer(layers)
    assert problem is not None and f"attention of 1 has {said}" in problem
    assert "--vericache-verify-attention backend" in problem


def test_a_cap_of_another_kind():
    layer = radix_attention()
    layer.logit_cap, layer.logit_capping_method = 30.0, "tanh"
    assert unserved_layer(torch.nn.ModuleList([layer])) is None
    layer.logit_capping_method = "softplus"
    assert "cap other than tanh" in unserved_layer(torch.nn.ModuleList([layer]))


@pytest.mark.parametrize("choice", [AUTO, TRITON])
def test_a_pool_that_it_does_not_read(choice):
    """Catches a server that cannot start because of a kernel that nobody asked for."""
    batch = Batch([9], 4, heads=2, group=2)
    keys = torch.zeros((4, 2, 16), dtype=torch.float8_e4m3fn)
    pool = SimpleNamespace(get_key_buffer=lambda _: keys, get_value_buffer=lambda _: keys)
    table = SimpleNamespace(req_to_token=batch.table, size=1)
    given = VeriCacheConfig(verify_attention=choice), torch.nn.Module(), pool, table, range(2), 4
    if choice == AUTO:
        assert create_row_attention(*given) is None
        return
    with pytest.raises(VeriCacheConfigError, match="does not fit the KV pool"):
        create_row_attention(*given)


class FlashInferAttnBackend:
    pass


@pytest.mark.parametrize(
    ("capability", "backend", "expected"),
    [
        ((8, 9), FlashInferAttnBackend(), False),
        ((9, 0), FlashInferAttnBackend(), True),
        ((9, 0), object(), False),
    ],
)
def test_where_auto_takes_the_kernel(monkeypatch, capability, backend, expected):
    """Catches launch constants of an H200 where shared memory is half as large, and a kernel in
    place of a backend that computes something else."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert is_preferred(torch.device("cuda:0"), backend) is expected
    assert not is_preferred(torch.device("cpu"), backend)


@pytest.mark.parametrize(
    ("config", "rows", "group", "said"),
    [
        (VeriCacheConfig(), 256, 16, None),
        (VeriCacheConfig(offload=AUTO), None, 64, None),
        (VeriCacheConfig(horizon=16), 128, 8, "17 tokens of 8 query heads"),
        (VeriCacheConfig(horizon=16), 128, 8, "serves --vericache-horizon up to 15; "),
        (VeriCacheConfig(offload=AUTO), 128, 8, "serves --vericache-horizon up to 7; "),
        (VeriCacheConfig(), 128, 71, "1136. --vericache-verify-attention backend serves any."),
    ],
)
def test_more_tokens_than_the_kernel_holds(config, rows, group, said):
    """Catches a server that fails in its first wide pass, and advice that would not help."""
    problem = too_wide(config, rows, group)
    if said is None:
        assert problem is None
        return
    assert problem is not None and said in problem
    if "horizon up to" in said:
        horizon = int(problem.split("horizon up to ")[1].split(";")[0])
        assert too_wide(replace(config, horizon=horizon), rows, group) is None
        assert too_wide(replace(config, horizon=horizon + 1), rows, group) is not None
