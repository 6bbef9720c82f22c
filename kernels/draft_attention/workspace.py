"""Memory for the partial results of split attention."""

from __future__ import annotations

import torch

from sglang_vericache.kernels.draft_attention.config import (
    config_of,
    kind_of,
    multiprocessors,
    split_count,
)
from sglang_vericache.kernels.pool_format import PoolStorage


class Workspace:
    """Buffers that successive launches share, so that a captured graph holds no memory for them.

    With one, the last split to finish combines the others' results, where those are few rows: one
    launch a layer. Without, the buffers are taken from torch at each call and a second launch
    combines.

    Precondition: launches that use one workspace follow each other on one stream.

    Attributes:
        counters: ``[pairs]`` int32, zero between launches.
    """

    def __init__(self, pairs: int, partial_rows: int, dim: int, device: torch.device | str) -> None:
        self.partial = torch.empty(partial_rows * dim, dtype=torch.float32, device=device)
        self.statistics = torch.empty(2 * partial_rows, dtype=torch.float32, device=device)
        self.counters = torch.zeros(pairs, dtype=torch.int32, device=device)

    @classmethod
    def create(
        cls,
        storage: PoolStorage,
        max_batch: int,
        query_heads: int,
        table_width: int,
        max_queries: int = 1,
    ) -> Workspace:
        """Enough for every batch of up to ``max_batch`` requests of ``max_queries`` queries."""
        device = storage.device
        heads, group = storage.heads, query_heads // storage.heads
        partial_rows = 0
        for query_rows in range(group, max_queries * group + 1, group):
            config = config_of(storage, query_rows)
            for batch in range(1, max_batch + 1):
                splits = split_count(config, batch, heads, table_width, multiprocessors(device))
                if splits > 1 or kind_of(storage) == "int4":  # else nothing is combined
                    partial_rows = max(partial_rows, batch * heads * splits * query_rows)
        return cls(max_batch * heads, partial_rows, storage.head_dim, device)

    def check(self, pairs: int, partial_rows: int, dim: int) -> None:
        """Raises ValueError when a launch needs more."""
        enough = pairs <= self.counters.numel() and partial_rows * dim <= self.partial.numel()
        if not enough or 2 * partial_rows > self.statistics.numel():
            raise ValueError(
                f"the workspace is too small for {pairs} pairs of request and head with "
                f"{partial_rows} partial rows of {dim}"
            )
