"""The draft attention kernel against attention in torch over the decoded pool, in every format,
head size and way of splitting. The reference itself is checked in test_draft_attention.py."""

from __future__ import annotations

import pytest
import torch
from pools import (
    ALL_FORMATS,
    DEVICE,
    FORMATS,
    INTERPRETED,
    Views,
    assert_same_bits,
    model_dtype,
    needs_triton,
    relative_error,
    twin,
    views,
)

from sglang_vericache.kernels.draft_attention import reference
from sglang_vericache.kernels.formats.hadamard import rotate, rotation_block
from sglang_vericache.kernels.pool_format import DenseFormat, Int4Format

# Norm of the difference over the norm of the output.
TOLERANCES = {
    "float32": 2e-6,  # sums in another order
    "float16": 1e-3,  # weights and output have 11 bits
    # Weights and output have 8 bits; the interpreter cuts where hardware rounds.
    "bfloat16": 8e-3,
    "fp8_e4m3": 1e-3,  # weights and output in float16; query and keys are exact there
    "int4": 1e-3,  # scaled weights in float16; the codes are exact there, for the query see as_read
}


def query_for(case: Views, queries: int, group: int) -> torch.Tensor:
    storage = case.storage
    shape = (len(case.lengths), queries, storage.heads * group, storage.head_dim)
    return torch.randn(shape, device=DEVICE).to(model_dtype(storage.format))


def as_read(query: torch.Tensor, case: Views) -> torch.Tensor:
    """The query as the kernel multiplies it, which over an int4 pool is rotated and in float16.

    The reference gets that one: its products are off by up to 2^-11, which moves logits of size 30
    by nearly 0.01. Where two rows share the weight, that is more than all other rounding together:
    by the exact query a quarter of all draws would fail on any machine, and devices draw their own.
    """
    if not isinstance(case.storage.format, Int4Format):
        return query
    block = rotation_block(case.storage.head_dim)
    return rotate(rotate(query, block).half(), block)


def arguments(case: Views) -> tuple:
    return case.storage, 1, case.row_table, case.rows, case.lengths, case.storage.head_dim**-0.5


def workspace_for(query: torch.Tensor, case: Views, num_splits: int):
    from sglang_vericache.kernels.draft_attention.workspace import Workspace

    batch, queries, query_heads, dim = query.shape
    rows = batch * num_splits * queries * query_heads
    return Workspace(batch * case.storage.heads, rows, dim, query.device)


def check(case: Views, query: torch.Tensor, logit_cap: float = 0.0, **options) -> torch.Tensor:
    from sglang_vericache.kernels.draft_attention.triton import draft_attention

    wanted = reference.draft_attention(as_read(query, case), *arguments(case), logit_cap)
    found = draft_attention(query, *arguments(case), logit_cap, **options)
    assert (found.shape, found.dtype) == (query.shape, query.dtype)
    assert relative_error(found, wanted) < TOLERANCES[case.storage.format.name]
    return found


@needs_triton
@ALL_FORMATS
@pytest.mark.parametrize(
    ("dim", "heads", "group", "queries"),
    [(64, 3, 3, 1), (80, 2, 1, 3), (96, 1, 7, 1), (128, 2, 4, 1), (128, 1, 16, 3), (256, 1, 4, 3)],
)
def test_shapes(pool_format, dim, heads, group, queries):
    """Catches padding of heads, dimensions and rows that leaks into the sums, and a causal mask
    that is wrong with several queries."""
    case = views(pool_format, [37, 150, 3, 0], heads, dim)
    check(case, query_for(case, queries, group))


@needs_triton
@pytest.mark.parametrize("name", ["bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize(
    ("dim", "group", "queries"), [(64, 3, 8), (80, 4, 8), (128, 4, 16), (64, 7, 16), (64, 12, 16)]
)
def test_many_queries(name, dim, group, queries):
    """24 to 192 rows of queries, as verify passes have. Catches slots read ahead that are those of
    another block or past the end, and rows of queries that mix."""
    pool_format = next(f for f in FORMATS if f.name == name)
    case = views(pool_format, [270, 64, 17], 1, dim)
    check(case, query_for(case, queries, group), num_splits=2)


@needs_triton
def test_more_queries_than_a_program_holds():
    from sglang_vericache.kernels.draft_attention import most_query_rows

    case = views(DenseFormat(torch.bfloat16), [40], 1, 256)
    assert most_query_rows(case.storage) == 128
    with pytest.raises(ValueError, match="up to 128 rows of queries of head_dim 256, not 144"):
        check(case, query_for(case, 9, 16))


@needs_triton
@pytest.mark.parametrize("name", ["float32", "int4"])
def test_splits_of_short_views(name):
    """Splits are counted for the longest view that a table can hold. Catches one that is cut into
    so many that each has a block or less."""
    from sglang_vericache.kernels.draft_attention.config import LEAST_SPLIT_ROWS
    from sglang_vericache.kernels.draft_attention.workspace import Workspace

    pool_format = next(f for f in FORMATS if f.name == name)
    case = views(pool_format, [300, 5, 0], 1, 64)
    query = query_for(case, 1, 3)
    wide = torch.zeros(len(case.row_table), 4096, dtype=torch.int32, device=DEVICE)
    wide[:, : case.row_table.shape[1]] = case.row_table
    wide_case = Views(case.storage, wide, case.rows, case.lengths)
    workspace = Workspace.create(case.storage, 3, 3, wide.shape[1])
    workspace.statistics.fill_(float("nan"))
    for used in (workspace, None):
        check(wide_case, query, workspace=used)
    splits = workspace.statistics.view(-1, 2, 3)[:, 1, 0]
    written = int((~splits.isnan()).sum())
    assert written == -(-300 // LEAST_SPLIT_ROWS) + 2


@needs_triton
@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("with_workspace", [False, True], ids=["two-launches", "fused"])
@pytest.mark.parametrize("name", ["float32", "int4"])
def test_splits(name, num_splits, with_workspace):
    """Catches rows read twice or never where splits meet, partial results that carry the wrong
    maximum, splits of short views that are empty, and counters that are not back at zero, which
    the next layer would find."""
    pool_format = next(f for f in FORMATS if f.name == name)
    case = views(pool_format, [161, 1, 0, 64, 130], 2, 64, spread=3.0)
    query = query_for(case, 1, 3)
    if not with_workspace:
        check(case, query, num_splits=num_splits)
        return
    workspace = workspace_for(query, case, num_splits)
    for _ in range(2):
        check(case, query, num_splits=num_splits, workspace=workspace)
        assert not workspace.counters.any()


@needs_triton
@ALL_FORMATS
def test_peaked_attention(pool_format):
    """Catches scores that overflow, and a running maximum that is not carried: logits of size
    30, where one or two rows have all the weight."""
    case = views(pool_format, [170, 90], 1, 64, spread=30.0)
    check(case, query_for(case, 1, 2))


@needs_triton
@pytest.mark.parametrize("name", ["bfloat16", "int4"])
@pytest.mark.parametrize("cap", [0.5, 20.0])
def test_logit_cap(name, cap):
    """Catches a cap applied before the scale, or to a score that still lacks its zero point."""
    pool_format = next(f for f in FORMATS if f.name == name)
    case = views(pool_format, [70, 20], 2, 64, spread=10.0)
    check(case, query_for(case, 2, 2), logit_cap=cap)


@needs_triton
@ALL_FORMATS
@pytest.mark.parametrize("queries", [1, 3])
def test_append_and_attend(pool_format, queries):
    """Catches new rows that are read before they are written, that are written by no split or
    encoded differently, and padded rows that touch a request's slots."""
    from sglang_vericache.kernels.draft_attention.triton import append_and_attend

    # Three splits of 64: the new rows of the second view lie in two of them.
    case = views(pool_format, [150, 66, 0, 7], 2, 64)
    query = query_for(case, queries, 3)
    tokens = len(case.lengths) * queries
    projected = torch.randn(tokens, 2 * 2 * 64, device=DEVICE).to(query.dtype)
    keys, values = (part.view(tokens, 2, 64) for part in projected.split(2 * 64, dim=1))
    new = (keys, values, case.last_slots(queries))
    other = twin(case.storage)
    wanted = reference.append_and_attend(as_read(query, case), *new, other, *arguments(case)[1:])
    for workspace in (None, workspace_for(query, case, 3)):
        found = append_and_attend(query, *new, *arguments(case), num_splits=3, workspace=workspace)
        assert_same_bits(case.storage, other)
        assert relative_error(found, wanted) < TOLERANCES[pool_format.name]


@needs_triton
def test_query_slices_of_a_wider_row():
    """Models hand out queries as slices of one projection: catches a stride that is assumed."""
    for pool_format in (DenseFormat(torch.float32), Int4Format()):
        case = views(pool_format, [30, 17], 2, 64)
        projected = torch.randn(2, 8 * 64, device=DEVICE)
        check(case, projected[:, : 6 * 64].view(2, 1, 6, 64))


@needs_triton
def test_workspace_too_small():
    """Catches a batch larger than planned for that writes past the end."""
    case = views(DenseFormat(torch.float32), [30, 17], 2, 64)
    query = query_for(case, 1, 2)
    workspace = workspace_for(query[:1], case, 2)
    with pytest.raises(ValueError, match="workspace is too small"):
        check(case, query, workspace=workspace, num_splits=2)


@needs_triton
def test_workspace_is_enough():
    """Catches a workspace sized for the largest batch only: smaller ones have more splits."""
    from sglang_vericache.kernels.draft_attention.workspace import Workspace

    case = views(DenseFormat(torch.float32), [500, 10, 40, 90], 1, 64)
    query = query_for(case, 2, 2)
    workspace = Workspace.create(case.storage, 4, 2, case.row_table.shape[1], max_queries=2)
    for batch in (1, 2, 4):
        some = Views(case.storage, case.row_table, case.rows[:batch], case.lengths[:batch])
        for queries in (1, 2):
            check(some, query[:batch, -queries:].contiguous(), workspace=workspace)


@needs_triton
@pytest.mark.parametrize(
    ("requests", "heads"), [(1, 1), (1, 8), (3, 1), (12, 8), (128, 3), (256, 3), (625, 8)]
)
@pytest.mark.parametrize("processors", [8, 108, 132])
def test_splits_end_together(requests, heads, processors):
    """Catches multiprocessors with one program more than others for nothing, more splits than the
    table's rounds allow or the rows are worth, none at all, and several rounds of programs that
    are equally long."""
    from sglang_vericache.kernels.draft_attention.config import (
        LEAST_SPLIT_ROWS,
        MANY_ROWS,
        TABLE,
        split_count,
    )

    pairs = requests * heads

    def share(splits: int) -> float:
        each = pairs * splits / processors
        return each / -(-pairs * splits // processors)

    for config in (*TABLE.values(), *MANY_ROWS.values()):
        rounds = min(config.rounds, requests)
        most = max(1, int(rounds * config.resident * processors) // pairs)
        splits = split_count(config, requests, heads, 1 << 20, processors)
        assert most - most // 4 <= splits <= most
        assert share(splits) >= share(most)
        assert split_count(config, requests, heads, 3 * LEAST_SPLIT_ROWS, processors) <= 3


@needs_triton
@pytest.mark.parametrize("block_n", [16, 32, 128])
def test_block_size_changes_nothing(block_n):
    """Catches masks that only work for the block of the table."""
    from sglang_vericache.kernels.draft_attention.config import AttentionConfig

    case = views(Int4Format(), [150, 33], 1, 64)
    check(case, query_for(case, 1, 3), config=AttentionConfig(block_n, 1, 2, 4), num_splits=2)


@needs_triton
def test_no_requests():
    """Catches a launch of nothing, which CUDA refuses."""
    case = views(DenseFormat(torch.float32), [30], 2, 64)
    some = Views(case.storage, case.row_table, case.rows[:0], case.lengths[:0])
    from sglang_vericache.kernels.draft_attention.triton import draft_attention

    assert draft_attention(query_for(some, 1, 2), *arguments(some)).shape == (0, 1, 4, 64)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("fp8_e4m3", 0.01, 0.04), ("int4", 0.06, 0.16)]
)
def test_what_quantisation_costs(name, least, most):
    """Attention over the stored rows against attention over the exact ones, diffuse as in long
    contexts: about 3 % in fp8 and 10 % in int4. Catches a format that lost a bit, and one that is
    so exact that it cannot be what it says."""
    pool_format = next(f for f in FORMATS if f.name == name)
    exact = views(DenseFormat(torch.float32), [900, 1200], 2, 128)
    stored = views(pool_format, [900, 1200], 2, 128)
    slots = torch.cat([exact.slots(0), exact.slots(1)])
    for tensor in (stored.row_table, stored.rows):
        tensor.copy_(exact.row_table if tensor is stored.row_table else exact.rows)
    stored.storage.write(1, slots, *exact.storage.read(1, slots))
    query = torch.randn(2, 1, 8, 128, device=DEVICE)
    found, wanted = (reference.draft_attention(query, *arguments(c)) for c in (stored, exact))
    assert least < relative_error(found, wanted) < most


def test_tolerances_are_tight():
    """A dropped row or a scale in place of another must not pass as rounding."""
    case = views(Int4Format(), [150], 1, 64)
    query = query_for(case, 1, 3)
    wanted = reference.draft_attention(query, *arguments(case))
    shorter = Views(case.storage, case.row_table, case.rows, case.lengths - 1)
    without = reference.draft_attention(query, *arguments(shorter))
    assert relative_error(without, wanted) > 5 * TOLERANCES["int4"]


def test_the_kernels_are_what_runs():
    """Catches a dispatch that falls back to torch where a kernel was meant, or the reverse."""
    from sglang_vericache.kernels.dispatch import runs_triton

    assert runs_triton(torch.zeros(1, device=DEVICE)) == (INTERPRETED or DEVICE == "cuda")
