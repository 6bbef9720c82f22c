"""What `benchmarks.kernels` times of a verify pass: FlashInfer's attention under our plan, and the
draft steps' kernel over the full KV."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernel_cases import LAYERS, MODEL_DTYPE, Shape, Timed
from sglang_vericache.kernels.draft_attention.config import (
    AttentionConfig,
    config_of,
    multiprocessors,
    split_count,
)
from sglang_vericache.kernels.draft_attention.triton import draft_attention
from sglang_vericache.kernels.draft_attention.workspace import Workspace
from sglang_vericache.kernels.pool_format import PoolStorage

if TYPE_CHECKING:
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
    from sglang_vericache.verify.chain_plan import ChainPlan  # our own kernel needs no SGLang

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
    query = _queries(shape, width)
    [wrapper] = plan.metadata.prefill_wrappers
    scale = shape.dim**-0.5
    calls = [
        lambda pool=pool: wrapper.forward(query, (pool[0], pool[1]), causal=True, sm_scale=scale)
        for pool in pools
    ]
    return Timed(calls, _moved_bytes(shape, width))


class RowCase:
    """The same pass by the kernel that draft steps use."""

    def __init__(self, shape: Shape, width: int) -> None:
        device = "cuda"
        slots = shape.requests * (shape.context + width) + 1
        pools = [
            torch.randn(2, slots, shape.heads, shape.dim, device=device, dtype=MODEL_DTYPE)
            for _ in range(LAYERS)
        ]
        self.shape, self.width = shape, width
        self.storage = PoolStorage.over([pool[0] for pool in pools], [pool[1] for pool in pools])
        table = torch.arange(1, slots, device=device, dtype=torch.int32)
        self.table = table.view(shape.requests, -1)
        self.requests = torch.arange(shape.requests, device=device)
        self.lengths = torch.full((shape.requests,), shape.context + width, device=device)
        self.query = _queries(shape, width).view(shape.requests, width, shape.query_heads, -1)

    @property
    def query_rows(self) -> int:
        return self.width * self.shape.query_heads // self.shape.heads

    @property
    def pairs(self) -> int:
        return self.shape.requests * self.shape.heads

    def splits_of(self, config: AttentionConfig) -> int:
        processors = multiprocessors(self.query.device)
        shape = self.shape
        return split_count(config, shape.requests, shape.heads, self.table.shape[1], processors)

    def timed(self, config: AttentionConfig | None = None, splits: int | None = None) -> Timed:
        """Args: in place of the table's."""
        config = config or config_of(self.storage, self.query_rows)
        splits = splits or self.splits_of(config)
        partial_rows = self.pairs * splits * self.query_rows
        workspace = Workspace(self.pairs, partial_rows, self.shape.dim, self.query.device)
        scale = self.shape.dim**-0.5
        view = self.table, self.requests, self.lengths, scale
        calls = [
            lambda layer=layer: draft_attention(
                *(self.query, self.storage, layer, *view),
                workspace=workspace,
                config=config,
                num_splits=splits,
            )
            for layer in range(LAYERS)
        ]
        return Timed(calls, _moved_bytes(self.shape, self.width))


def _queries(shape: Shape, width: int) -> torch.Tensor:
    rows = shape.requests * width, shape.query_heads, shape.dim
    return torch.randn(rows, device="cuda", dtype=MODEL_DTYPE)


def _moved_bytes(shape: Shape, width: int) -> int:
    read = shape.requests * (shape.context + width) * shape.heads * shape.dim * 2
    queries = shape.requests * width * shape.query_heads * shape.dim
    return (read + 2 * queries) * MODEL_DTYPE.itemsize
