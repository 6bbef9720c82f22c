"""Attention of captured verify passes against a float32 formula.

Run by hand on a GPU: ``python -P -m pytest tests/integration -m gpu``.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CONTEXT = 3000
TOLERANCE = 0.02  # bfloat16


class Pass:
    """A captured pass over ``size`` requests with slots in random order."""

    def __init__(
        self, size: int, width: int, heads: int, group: int, dim: int, context: int = CONTEXT
    ) -> None:
        from benchmarks.verify_case import standalone_plan

        total = size * context + 1000
        self.size, self.width, self.group, device = size, width, group, "cuda"
        self.plan = standalone_plan(size, width, heads * group, heads, dim, total)
        keys, values = torch.randn(2, total, heads, dim, device=device).to(torch.bfloat16)
        self.keys, self.values = keys, values
        self.query = torch.randn(size * width, heads * group, dim, device=device).bfloat16()
        order = torch.randperm(total - 1, device=device)[: size * context] + 1
        self.table = order.view(size, context).to(torch.int32)
        self.requests = torch.arange(size, device=device)
        self.committed = torch.zeros(size, dtype=torch.int64, device=device)

    def capture(self) -> None:
        self.plan.plan(())
        self.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.run()

    def run(self) -> torch.Tensor:
        self.plan.fill_indices(self.table, self.requests, self.committed)
        [wrapper] = self.plan.metadata.prefill_wrappers
        pool = self.keys[:, None], self.values[:, None]
        return wrapper.forward(self.query, pool, causal=True, sm_scale=self.scale)

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    def replay(self, committed: list[int]) -> torch.Tensor:
        padded = committed + [0] * (self.size - len(committed))
        self.committed.copy_(torch.tensor(padded))
        self.plan.plan(committed)
        self.graph.replay()
        return self.output.view(self.size, self.width, -1, self.query.shape[-1]).float()

    def formula(self, request: int, committed: int) -> torch.Tensor:
        slots = self.table[request, : committed + self.width].long()
        keys, values = (
            pool[slots].float().repeat_interleave(self.group, 1)
            for pool in (self.keys, self.values)
        )
        query = self.query.view(self.size, self.width, *self.query.shape[1:])[request].float()
        scores = torch.einsum("qhd,khd->hqk", query, keys) * self.scale
        places = torch.arange(len(slots), device="cuda")
        last = committed + torch.arange(self.width, device="cuda")
        scores = scores.masked_fill(places > last[:, None], float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


class SharedPass(Pass):
    """Some of its requests begin with the same slots, as a radix tree has them."""

    def __init__(self, groups: list[tuple[int, int]], size: int, width: int, **shape: int) -> None:
        super().__init__(size, width, **shape)
        self.groups, first = groups, 0
        for count, tokens in groups:
            self.table[first : first + count, :tokens] = self.table[first, :tokens].clone()
            first += count

    def attend(self, committed: list[int]) -> torch.Tensor:
        from benchmarks.verify_case import standalone_runner
        from sglang_vericache.verify.cascade_plan import CascadePlan

        _, heads, dim = self.keys.shape
        runner = standalone_runner(heads * self.group, heads, dim)
        cascade = CascadePlan(runner, self.width, self.plan.kv_indices)
        padded = committed + [0] * (self.size - len(committed))
        for _ in range(2):  # planned again, with nothing of the last plan left
            cascade.plan(committed, self.groups, self.size)
            cascade.fill_indices(
                self.table, self.requests, torch.tensor(padded, device=self.table.device)
            )
            [wrapper] = cascade.metadata.prefill_wrappers
            pool = self.keys[:, None], self.values[:, None]
            found = wrapper.forward(
                self.query,
                pool,
                causal=True,
                sm_scale=self.scale,
                window_left=-1,
                logits_soft_cap=0.0,
                k_scale=None,
                v_scale=None,
            )
        return found.view(self.size, self.width, -1, self.query.shape[-1]).float()


@pytest.mark.parametrize(
    ("groups", "committed"),
    [
        pytest.param([(3, 2000)], [2000, 2001, 2900], id="all"),
        pytest.param([(2, 2000), (3, 700)], [2400, 2000, 700, 701, 2900, 1, 1500], id="two"),
        pytest.param([(2, 1)], [1, 5, 900, 64], id="one-token"),
        pytest.param([(4, 64)], [64, 64, 64, 64], id="nothing-of-their-own"),
        pytest.param([(2, 2600), (2, 2600), (2, 2600)], [2700] * 6, id="padded"),
    ],
)
@pytest.mark.parametrize(
    ("width", "group", "dim"), [(4, 4, 128), (8, 3, 64), (16, 4, 128), (16, 9, 64), (2, 1, 64)]
)
def test_a_shared_prefix_is_read_once(groups, committed, width, group, dim):
    """Catches queries that attend to another group's prefix or to none, tokens counted twice, and
    a request's own tokens seen before they are written."""
    passes = SharedPass(groups, 8, width, heads=3, group=group, dim=dim)
    found = passes.attend(committed)
    assert found.isfinite().all()
    for request, length in enumerate(committed):
        wanted = passes.formula(request, length)
        error = (found[request] - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE, request


# Rows of queries of a request and kv head: under and over one tile of 16, 64 and 128.
@pytest.mark.parametrize(
    ("width", "group", "dim"),
    [(4, 4, 128), (8, 3, 64), (16, 3, 64), (16, 4, 128), (17, 4, 128), (16, 9, 64), (1, 1, 64)],
)
def test_a_captured_pass_reads_all_and_only_its_own(width, group, dim):
    """Catches a plan that the graph does not follow: tiles of queries that do not fit those that
    were captured, other lengths, fewer requests than were captured."""
    passes = Pass(6, width, 3, group, dim)
    passes.capture()
    for committed in ([1, 130, 2900, 777, 64, 2048], [2900], [0, 5, 900], [2900] * 6):
        found = passes.replay(committed)
        for request, length in enumerate(committed):
            wanted = passes.formula(request, length)
            error = (found[request] - wanted).abs().max() / wanted.abs().max()
            assert error < TOLERANCE, (committed, request)


@pytest.mark.parametrize("width", [5, 8, 16])
def test_a_large_batch(width):
    """Catches tiles and indices that only hundreds of long requests have."""
    passes = Pass(256, width, 3, 3, 64, context=7800)
    passes.capture()
    for count in (256, 255, 3):
        committed = [7700 + i % 60 for i in range(count)]
        found = passes.replay(committed)
        for request in (0, count // 2, count - 1):
            wanted = passes.formula(request, committed[request])
            error = (found[request] - wanted).abs().max() / wanted.abs().max()
            assert error < TOLERANCE, (count, request)
