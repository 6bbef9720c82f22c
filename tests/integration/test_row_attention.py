"""What verify passes by the draft steps' kernel need beside their arithmetic."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import cpu_engine
import numpy as np
import pytest
import torch

cpu_engine.required()

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
    is_measured,
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


class RadixAttention(torch.nn.Module):
    def __init__(self, temperature=0):
        super().__init__()
        self.xai_temperature_len = temperature


def test_layers_that_the_kernel_does_not_compute():
    """Catches tokens of another formula than the model's, by default."""
    layers = torch.nn.ModuleList([RadixAttention(), RadixAttention()])
    assert unserved_layer(layers) is None
    layers[1].xai_temperature_len = 1024
    assert "attention of 1 has a temperature" in unserved_layer(layers)
    layers[1] = torch.nn.Module()
    layers[1].sinks = torch.nn.Parameter(torch.zeros(2))
    problem = unserved_layer(layers)
    assert problem is not None and "1 has sinks" in problem
    assert "--vericache-verify-attention backend" in problem


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True)])
def test_where_auto_takes_the_kernel(monkeypatch, capability, expected):
    """Catches launch constants of an H200 where shared memory is half as large."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert is_measured(torch.device("cuda:0")) is expected
    assert not is_measured(torch.device("cpu"))


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
