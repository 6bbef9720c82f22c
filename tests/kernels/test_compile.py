"""Every kernel compiles for an H100, without a GPU: what the interpreter cannot show."""

from __future__ import annotations

import re

import pytest
import torch
from pools import INTERPRETED

from sglang_vericache.kernels.pool_format import (
    DenseFormat,
    Fp8Format,
    Int4Format,
    PoolFormat,
    PoolStorage,
)

hopper = pytest.importorskip("hopper") if not INTERPRETED else None
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are Python under the interpreter")

BF16 = DenseFormat(torch.bfloat16)


@pytest.fixture
def launches(monkeypatch):
    return hopper.record_launches(monkeypatch)


def compiled(launches, folder) -> dict[str, hopper.Compiled]:
    """What was launched, by kernel."""
    found = {}
    for launch in launches:
        kernel = hopper.compile_for_hopper(launch, folder)
        assert kernel.stack_bytes == 0, f"{kernel.name} spills {kernel.stack_bytes} bytes"
        assert kernel.shared_bytes <= hopper.SHARED_BYTES
        found[kernel.name] = kernel
    return found


def new_storage(pool_format: PoolFormat, heads: int, dim: int) -> PoolStorage:
    return PoolStorage(pool_format, 2, 63, heads, dim, "cpu")


def attend(storage: PoolStorage, group: int, queries: int, append: bool, fused: bool) -> None:
    from sglang_vericache.kernels.draft_attention import triton
    from sglang_vericache.kernels.draft_attention.workspace import Workspace

    heads, dim = storage.heads, storage.head_dim
    query = torch.zeros(2, queries, heads * group, dim, dtype=torch.bfloat16)
    new = torch.zeros(2 * queries, heads, dim, dtype=torch.bfloat16)
    numbers = torch.zeros(2, dtype=torch.int64)
    view = torch.zeros(4, 1024, dtype=torch.int32), numbers, numbers
    workspace = Workspace(2 * heads, 4 * query.shape[:3].numel(), dim, "cpu") if fused else None
    options = {"workspace": workspace, "num_splits": 4}
    if append:
        slots = torch.zeros(2 * queries, dtype=torch.int64)
        triton.append_and_attend(query, new, new, slots, storage, 1, *view, 1.0, 0.0, **options)
    else:
        triton.draft_attention(query, storage, 1, *view, 1.0, 30.0, **options)


@pytest.mark.parametrize(
    ("pool_format", "heads", "group", "dim", "queries", "append"),
    [
        pytest.param(BF16, 3, 3, 64, 1, True, id="bf16-64"),
        pytest.param(BF16, 8, 4, 128, 1, True, id="bf16-128"),
        pytest.param(BF16, 2, 16, 80, 3, False, id="bf16-80-many-rows"),
        pytest.param(Fp8Format(), 8, 4, 128, 1, True, id="fp8-128"),
        pytest.param(Int4Format(), 3, 3, 64, 1, True, id="int4-64"),
        pytest.param(Int4Format(), 8, 4, 128, 1, True, id="int4-128"),
        pytest.param(Int4Format(), 4, 7, 80, 3, False, id="int4-80-many-rows"),
    ],
)
def test_attention(launches, tmp_path, pool_format, heads, group, dim, queries, append):
    """Catches spills, tables of constants that do not fit, loads that are not asynchronous, and a
    combination without the ordering that it rests on."""
    attend(new_storage(pool_format, heads, dim), group, queries, append, fused=append)
    kernels = compiled(launches, tmp_path)
    main = kernels.get("attend_dense") or kernels["attend_int4"]
    widths = set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], (0x\w+)", main.ptx))
    # 16 bytes of rows; int4 rows of 80 dimensions are 40 bytes, so 8 at a time.
    assert ("0x8" if (pool_format.name, dim) == ("int4", 80) else "0x10") in widths
    assert "0x1" not in widths and "0x2" not in widths
    if append:
        assert len(kernels) == (2 if pool_format.name == "int4" else 1), "launches of a layer"
        assert "atom.global.gpu.acq_rel.add" in main.ptx
    else:
        assert "combine_splits" in kernels


@pytest.mark.parametrize(
    ("dim", "rows"),
    [
        *((64, rows) for rows in (16, 32, 64, 128, 256)),
        *((128, rows) for rows in (16, 32, 64, 128, 256)),
        *((256, rows) for rows in (16, 32, 64, 128)),
    ],
)
def test_passes_of_many_queries(launches, tmp_path, dim, rows):
    """Catches a table that counts on more programs at a time than registers and shared memory
    allow, spills, and blocks of rows one after the other where the table has them overlap."""
    from sglang_vericache.kernels.draft_attention.config import MANY_ROWS, TABLE

    attend(new_storage(BF16, 2, dim), rows // 4, 4, append=True, fused=True)
    kernel = compiled(launches, tmp_path)["attend_dense"]
    config = TABLE["half", dim] if rows == 16 else MANY_ROWS[rows, dim]
    threads = 32 * config.num_warps
    assert config.resident * threads * kernel.registers <= hopper.REGISTERS
    assert config.resident * (kernel.shared_bytes + hopper.RESERVED_BYTES) <= hopper.SHARED_BYTES_SM
    assert config.resident * threads <= hopper.THREADS
    block_bytes = 2 * config.block_n * dim * 2
    least = 2 if config.ahead and config.num_stages > 2 else 1
    assert kernel.shared_bytes >= least * block_bytes


@pytest.mark.parametrize("pool_format", [BF16, Fp8Format(), Int4Format()], ids=lambda f: f.name)
def test_copies(launches, tmp_path, pool_format):
    """Catches copies of a few bytes at a time, which the compiler chooses when it cannot see how
    an address is aligned, and a rotation each stage of which passes through shared memory."""
    from sglang_vericache.kernels.append_rows.triton import append_rows
    from sglang_vericache.kernels.commit_rows.triton import commit_rows
    from sglang_vericache.kernels.gather_span.triton import gather_span, regather_span

    storage = new_storage(pool_format, 4, 128)
    buffers = list(torch.zeros(2, 64, 4, 128, dtype=torch.bfloat16))
    slots = torch.zeros(48, dtype=torch.int64)
    picks = torch.zeros(2, 4, 48, dtype=torch.int64)
    append_rows(buffers[0][:48], buffers[1][:48], slots, storage, 1)
    commit_rows(buffers, buffers, slots, storage, slots)
    gather_span(buffers, buffers, slots, picks, storage, slots)
    regather_span(storage, slots, picks, slots)
    kernels = compiled(launches, tmp_path)
    assert len(kernels) == 4
    for kernel in kernels.values():
        assert "ld.global.v4.b32" in kernel.ptx, f"{kernel.name} loads less than 16 bytes"
        # Keys and values pass it once each, words and scales for their stores.
        assert kernel.ptx.count("bar.sync") <= 40, f"{kernel.name} moves its rows about"


@pytest.mark.parametrize(("heads", "group", "dim"), [(8, 4, 128), (4, 1, 80)])
def test_window_scores(launches, tmp_path, heads, group, dim):
    """Catches tiles that do not fit twice in a multiprocessor, products that miss the tensor cores,
    and queries loaded a number at a time."""
    from sglang_vericache.kernels.score_window.triton import score_window

    queries = torch.zeros(2, 64, heads * group, dim, dtype=torch.bfloat16)
    keys = list(torch.zeros(2, 4096, heads, dim, dtype=torch.bfloat16))
    score_window(
        queries, torch.zeros(64, dtype=torch.int64), keys, torch.zeros(4000).long(), 0, 1.0
    )
    kernels = compiled(launches, tmp_path)
    for name in ("window_statistics", "window_mass"):
        kernel = kernels[name]
        assert "wgmma" in kernel.ptx
        assert kernel.registers <= 128 and 2 * kernel.shared_bytes <= hopper.SHARED_BYTES
        assert "ld.global.v4.b32" in kernel.ptx


@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (4, 80)])
def test_token_sums(launches, tmp_path, heads, dim):
    """Catches spills, and loads of less than 8 bytes a thread."""
    from sglang_vericache.kernels.layer_buffers import LayerBuffers
    from sglang_vericache.kernels.slot_sums import new_weights
    from sglang_vericache.kernels.slot_sums.triton import count_changed

    buffers = LayerBuffers(list(torch.zeros(4, 64, heads, dim, dtype=torch.bfloat16)))
    sums, slots = torch.zeros(64, dtype=torch.int64), torch.zeros(48, dtype=torch.int64)
    changed = torch.zeros(1, dtype=torch.int32)
    count_changed(buffers, new_weights(buffers), slots, sums, slots, changed)
    (kernel,) = compiled(launches, tmp_path).values()
    assert "ld.global.v2.b64" in kernel.ptx or "ld.global.b64" in kernel.ptx


def test_steps_between_forwards(launches, tmp_path):
    """Catches spills, and logits loaded a number at a time."""
    from sglang_vericache.kernels.draft_state import DraftState
    from sglang_vericache.kernels.draft_state.triton import find_slots, load_requests, take_tokens
    from sglang_vericache.kernels.row_argmax.triton import row_argmax

    state, numbers = DraftState.zeros(64, torch.device("cpu")), torch.zeros(64, dtype=torch.int64)
    drafts = torch.zeros(64, 5, dtype=torch.int64)
    load_requests(state, numbers[:63].view(21, 3), numbers, numbers, numbers, drafts, numbers)
    find_slots(state, torch.zeros(64, 128, dtype=torch.int32))
    take_tokens(state, numbers, drafts)
    row_argmax(torch.zeros(64, 49152, dtype=torch.bfloat16))
    kernels = compiled(launches, tmp_path)
    assert len(kernels) == 5
    assert "ld.global.v4.b32" in kernels["greatest_of_part"].ptx
