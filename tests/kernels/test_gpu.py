"""What only a GPU shows: real sizes, races between programs, graph capture, hidden synchronisation.

Run by hand on an H100: ``python -P -m pytest tests/kernels -m gpu``.
"""

from __future__ import annotations

import pytest
import torch
from pools import FORMATS, Views, needs_gpu, relative_error, views

from sglang_vericache.kernels.append_rows import append_rows
from sglang_vericache.kernels.commit_rows import commit_rows
from sglang_vericache.kernels.commit_rows import reference as commit_reference
from sglang_vericache.kernels.draft_attention import (
    append_and_attend,
    create_workspace,
    draft_attention,
    reference,
)
from sglang_vericache.kernels.gather_span import gather_span, regather_span
from sglang_vericache.kernels.gather_span import reference as gather_reference
from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.pool_format import PoolStorage
from sglang_vericache.kernels.score_window import reference as window_reference
from sglang_vericache.kernels.score_window import score_window

pytestmark = [pytest.mark.gpu, needs_gpu]

# As in test_draft_attention_formats.py; the model is bf16, so the output has 8 bits.
TOLERANCE = 8e-3
# The sums of the same splits in another order, rounded to bf16: one rounding in a few differs.
SAME_SPLITS = 2e-3
POOLS = pytest.mark.parametrize("pool_format", FORMATS[1:], ids=lambda f: f.name)
# heads, group, head_dim, requests, rows: a 135M and an 8B model, a fifth of the real batch.
SHAPES = pytest.mark.parametrize(
    "shape", [(3, 3, 64, 50, 1700), (8, 4, 128, 4, 6700)], ids=["135M", "8B"]
)


def big_case(pool_format, shape) -> tuple[Views, torch.Tensor]:
    heads, group, dim, requests, rows = shape
    lengths = torch.randint(rows // 2, rows, (requests,)).tolist()
    case = views(pool_format, lengths, heads, dim, spread=2.0)
    query = torch.randn(requests, 1, heads * group, dim, device="cuda").to(torch.bfloat16)
    return case, query


def arguments(case: Views) -> tuple:
    return case.storage, 1, case.row_table, case.rows, case.lengths, case.storage.head_dim**-0.5


@POOLS
@SHAPES
def test_real_sizes(pool_format, shape):
    """Catches offsets that overflow, and splits and occupancy that small cases never reach."""
    case, query = big_case(pool_format, shape)
    workspace = create_workspace(case.storage, 256, query.shape[2], case.row_table.shape[1])
    wanted = reference.draft_attention(query, *arguments(case))
    for given in (None, workspace):
        found = draft_attention(query, *arguments(case), workspace=given)
        assert relative_error(found, wanted) < TOLERANCE


@POOLS
def test_the_last_split_sees_the_others(pool_format):
    """A race shows as a moving error: 300 times the same launch, with work before it that changes
    which program is last."""
    case, query = big_case(pool_format, (3, 3, 64, 40, 1700))
    workspace = create_workspace(case.storage, 64, query.shape[2], case.row_table.shape[1])
    wanted = draft_attention(query, *arguments(case))
    noise = torch.zeros(1 << 22, device="cuda")
    for repetition in range(300):
        if repetition % 3 == 0:
            noise[: 1 << (repetition % 22)].add_(1.0)
        workspace.partial.fill_(float("nan"))
        found = draft_attention(query, *arguments(case), workspace=workspace)
        assert relative_error(found, wanted) < SAME_SPLITS, f"repetition {repetition}"
    assert not workspace.counters.any()


@POOLS
def test_appended_rows_are_read(pool_format):
    """Catches a program that reads its new row before it has written it: 50 steps whose newest row
    has nearly all the weight, in the place of the last step's."""
    case, query = big_case(pool_format, (3, 3, 64, 40, 400))
    workspace = create_workspace(case.storage, 64, query.shape[2], case.row_table.shape[1])
    slots = case.last_slots(1)
    for _ in range(50):
        query = torch.randn_like(query)
        values = torch.randn(40, 3, 64, device="cuda").to(query.dtype)
        keys = 3 * query.view(40, 3, 3, 64).sum(dim=2)
        found = append_and_attend(query, keys, values, slots, *arguments(case), workspace=workspace)
        wanted = reference.draft_attention(query, *arguments(case))
        assert relative_error(found, wanted) < TOLERANCE
        new = values.repeat_interleave(3, dim=1)[:, None]
        assert relative_error(found, new) < 0.5, "the newest row is what counts"


@POOLS
def test_graph_capture(pool_format):
    """Catches launches that need the host: captured once, replayed with other lengths, queries
    and slots."""
    case, query = big_case(pool_format, (3, 3, 64, 20, 900))
    storage = case.storage
    workspace = create_workspace(storage, 32, query.shape[2], case.row_table.shape[1])
    keys = torch.randn(20, 3, 64, device="cuda").to(torch.bfloat16)
    values, slots = torch.randn_like(keys), case.last_slots(1)
    static = (query, keys, values, slots)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        fused = append_and_attend(*static, *arguments(case), workspace=workspace)
        return fused, draft_attention(query, *arguments(case))

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for _ in range(5):
        query.copy_(torch.randn_like(query))
        keys.copy_(torch.randn_like(keys))
        case.lengths.copy_(torch.randint(1, 400, (20,), device="cuda"))
        slots.copy_(case.last_slots(1))
        graph.replay()
        wanted = reference.draft_attention(query, *arguments(case))
        for found in outputs:
            assert relative_error(found, wanted) < TOLERANCE


@POOLS
def test_no_synchronisation(pool_format):
    """Catches a length, a pointer or a count that is read back or sent over at a call."""
    case, query = big_case(pool_format, (3, 3, 64, 20, 300))
    storage, layers = case.storage, 2
    workspace = create_workspace(storage, 32, query.shape[2], case.row_table.shape[1])
    main = torch.randn(2, layers, 500, 3, 64, device="cuda").to(torch.bfloat16)
    keys, values = LayerBuffers(list(main[0])), LayerBuffers(list(main[1]))
    slots = torch.arange(20, device="cuda")
    picks = torch.arange(20, device="cuda").expand(layers, 3, 20).contiguous()
    window = torch.randn(layers, 8, 9, 64, device="cuda").to(torch.bfloat16)
    new = (query, keys[0][:20], values[0][:20], case.last_slots(1))

    def everything() -> None:
        draft_attention(query, *arguments(case))
        append_and_attend(*new, *arguments(case), workspace=workspace)
        append_rows(new[1], new[2], slots, storage, 0)
        commit_rows(keys, values, slots, storage, slots)
        gather_span(keys, values, slots, picks, storage, slots)
        regather_span(storage, slots, picks, slots + 20)
        score_window(window, slots[:8], keys, slots, 0, 0.1)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@POOLS
def test_many_slots(pool_format):
    """Catches 32-bit offsets: a layer of more than 2^31 numbers, rows at its end."""
    heads, dim = 8, 128
    slots = (1 << 31) // (heads * dim) + 5000
    storage = PoolStorage(pool_format, 1, slots, heads, dim, "cuda")
    last = torch.arange(slots - 63, slots + 1, device="cuda")
    keys, values = torch.randn(2, 64, heads, dim, device="cuda").to(torch.bfloat16)
    append_rows(keys, values, last, storage, 0)
    table = last.to(torch.int32)[None]
    query = torch.randn(1, 1, 32, dim, device="cuda").to(torch.bfloat16)
    zero, length = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.tensor([64]).cuda()
    view = (storage, 0, table, zero, length, dim**-0.5)
    wanted = reference.draft_attention(query, *view)
    assert relative_error(draft_attention(query, *view), wanted) < TOLERANCE


@pytest.mark.parametrize("tokens", [5000, 131072])
@pytest.mark.parametrize(("heads", "group", "dim", "window"), [(8, 4, 128, 64), (3, 3, 64, 64)])
def test_window_scores(tokens, heads, group, dim, window):
    """Catches splits that small cases never have, sums over 128K tokens that lose the small ones,
    and query rows that fill no block."""
    layers = 2
    # Queries are a part of what a prefill saw, slots a part of a row: neither starts aligned.
    seen = torch.randn(layers, window + 3, heads * group, dim, device="cuda").to(torch.bfloat16)
    queries = seen[:, 3:]
    keys = list(torch.randn(layers, tokens + 1, heads, dim, device="cuda").to(torch.bfloat16))
    slots = torch.randperm(tokens, device="cuda")[1:] + 1
    positions = torch.arange(tokens - 1 - window, tokens - 1, device="cuda")
    found = score_window(queries, positions, keys, slots, 0, dim**-0.5)
    for layer in range(layers):
        one = slice(layer, layer + 1)
        wanted = window_reference.score_window(
            queries[one], positions, keys[one], slots, 0, dim**-0.5
        )
        assert relative_error(found[one], wanted) < 1e-4


@POOLS
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (8, 128)])
def test_building_at_real_sizes(pool_format, heads, dim):
    """Catches rows that are gathered or committed to other places than the reference's."""
    layers, tokens, kept = 3, 7700, 1540
    main = torch.randn(2, layers, 9000, heads, dim, device="cuda").to(torch.bfloat16)
    keys, values = LayerBuffers(list(main[0])), LayerBuffers(list(main[1]))
    slots = (torch.randperm(8999, device="cuda") + 1)[3 : 3 + tokens]
    picks = torch.rand(layers, heads, tokens, device="cuda").topk(kept, dim=2).indices
    picks = picks.sort(dim=2).values
    pools = [PoolStorage(pool_format, layers, 4000, heads, dim, "cuda") for _ in range(2)]
    targets = (torch.randperm(3999, device="cuda") + 1)[1 : 1 + kept]
    tail = torch.arange(1, 257, device="cuda") + 3700
    for pool, gather, commit in (
        (pools[0], gather_span, commit_rows),
        (pools[1], gather_reference.gather_span, commit_reference.commit_rows),
    ):
        gather(keys, values, slots, picks, pool, targets)
        commit(keys, values, slots[5:261], pool, tail)
    for layer in range(layers):
        rows = torch.cat([targets, tail])
        for found, wanted in zip(
            pools[0].read(layer, rows), pools[1].read(layer, rows), strict=True
        ):
            assert relative_error(found, wanted) < TOLERANCE
