"""What `benchmarks.kernels` times of a verify pass: FlashInfer's attention under our plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.kernel_cases import LAYERS, MODEL_DTYPE, Shape, Timed
from sglang_vericache.verify.chain_plan import ChainPlan

WORKSPACE_BYTES = 384 << 20  # SGLang's default


def standalone_runner(query_heads: int, heads: int, dim: int) -> Any:
    """As much of a model runner, without a server, as a plan asks for."""
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    updater = SimpleNamespace(
        num_qo_heads=query_heads,
        num_kv_heads=heads,
        head_dim=dim,
        q_data_type=MODEL_DTYPE,
        data_type=MODEL_DTYPE,
    )
    backend = SimpleNamespace(
        workspace_buffer=workspace, prefill_backend="fa2", indices_updater_prefill=updater
    )
    return SimpleNamespace(attn_backend=backend)


def new_indices(slots: int) -> torch.Tensor:
    """Room for a list of so many slots."""
    return torch.zeros(slots, dtype=torch.int32, device="cuda")


def standalone_plan(
    size: int, width: int, query_heads: int, heads: int, dim: int, slots: int
) -> ChainPlan:
    """A plan without a server."""
    runner = standalone_runner(query_heads, heads, dim)
    return ChainPlan(runner, size, width, new_indices(slots))


def verify_attention(shape: Shape, width: int) -> Timed:
    """A layer of a captured pass: ``width`` queries of each request over its context."""
    device = "cuda"
    slots = shape.requests * (shape.context + width) + 1
    plan = standalone_plan(shape.requests, width, shape.query_heads, shape.heads, shape.dim, slots)
    table = torch.arange(1, slots, device=device, dtype=torch.int32).view(shape.requests, -1)
    committed = torch.full((shape.requests,), shape.context, device=device)
    plan.plan([shape.context] * shape.requests)
    plan.fill_indices(table, torch.arange(shape.requests, device=device), committed)
    pools = [
        torch.randn(2, slots, 1, shape.heads, shape.dim, device=device, dtype=MODEL_DTYPE)
        for _ in range(LAYERS)
    ]
    rows = shape.requests * width
    query = torch.randn(rows, shape.query_heads, shape.dim, device=device, dtype=MODEL_DTYPE)
    [wrapper] = plan.metadata.prefill_wrappers
    scale = shape.dim**-0.5
    calls = [
        lambda pool=pool: wrapper.forward(query, (pool[0], pool[1]), causal=True, sm_scale=scale)
        for pool in pools
    ]
    read = shape.requests * (shape.context + width) * shape.heads * shape.dim * 2
    return Timed(calls, (read + 2 * query.numel()) * MODEL_DTYPE.itemsize)
