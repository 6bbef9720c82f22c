"""Moving requests on in one launch each: a dozen launches of torch take longer than a layer.

Grid: (blocks of requests).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vericache.kernels.draft_state.state import DraftState

BLOCK = 128


@triton.jit(do_not_specialize=["count", "size"])
def load_requests_kernel(
    plan, batch_requests, pending, committed, drafts, offsets,
    requests, tokens, positions, lengths, columns, targets, drafts_width, count, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known, within = i < count, i < size
    index = tl.load(plan + 3 * i, mask=known, other=0)
    done = tl.load(plan + 3 * i + 1, mask=known, other=0)
    wanted = tl.load(plan + 3 * i + 2, mask=known, other=0)
    request = tl.load(batch_requests + index, mask=known, other=0).to(tl.int64)
    last = tl.load(drafts + request * drafts_width + done - 1, mask=known & (done > 0), other=0)
    first = tl.load(pending + index, mask=known & (done == 0), other=0)
    position = tl.load(committed + index, mask=known, other=0).to(tl.int64) + done
    length = position + tl.load(offsets + request, mask=known, other=0) + 1
    tl.store(requests + i, request, mask=within)
    tl.store(tokens + i, tl.where(done > 0, last, first.to(tl.int64)), mask=within)
    tl.store(positions + i, position, mask=within)
    tl.store(lengths + i, tl.where(known, length, 1), mask=within)
    tl.store(columns + i, done, mask=within)
    tl.store(targets + i, wanted, mask=within)


@triton.jit(do_not_specialize=["count"])
def find_slots_kernel(
    requests, lengths, columns, targets, slots, row_table, table_width, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    column = tl.load(columns + i, mask=valid, other=0)
    wants = valid & (column < tl.load(targets + i, mask=valid, other=0))
    request = tl.load(requests + i, mask=valid, other=0)
    last = tl.load(lengths + i, mask=valid, other=1) - 1
    slot = tl.load(row_table + request * table_width + last, mask=wants, other=0)
    tl.store(slots + i, slot.to(tl.int64), mask=valid)


@triton.jit(do_not_specialize=["count"])
def take_tokens_kernel(
    requests, tokens, positions, lengths, columns, targets, drafted, drafts, drafts_width, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    column = tl.load(columns + i, mask=valid, other=0)
    wants = valid & (column < tl.load(targets + i, mask=valid, other=0))
    request = tl.load(requests + i, mask=valid, other=0)
    token = tl.load(drafted + i, mask=valid, other=0)
    place = tl.where(wants, column, drafts_width - 1)
    tl.store(drafts + request * drafts_width + place, token, mask=valid)
    tl.store(tokens + i, token, mask=wants)
    tl.store(positions + i, tl.load(positions + i, mask=wants, other=0) + 1, mask=wants)
    tl.store(lengths + i, tl.load(lengths + i, mask=wants, other=0) + 1, mask=wants)
    tl.store(columns + i, column + 1, mask=wants)


def load_requests(
    state: DraftState,
    plan: torch.Tensor,
    requests: torch.Tensor,
    pending: torch.Tensor,
    committed: torch.Tensor,
    drafts: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """As `reference.load_requests`; ``drafts`` is contiguous."""
    assert drafts.is_contiguous()
    size = state.requests.shape[0]
    load_requests_kernel[(triton.cdiv(size, BLOCK),)](
        plan.contiguous(),
        requests.contiguous(),
        pending.contiguous(),
        committed.contiguous(),
        drafts,
        offsets,
        state.requests,
        state.tokens,
        state.positions,
        state.lengths,
        state.columns,
        state.targets,
        drafts.shape[1],
        plan.shape[0],
        size,
        BLOCK=BLOCK,
        num_warps=4,
    )


def find_slots(state: DraftState, row_table: torch.Tensor) -> None:
    """As `reference.find_slots`."""
    count = state.requests.shape[0]
    find_slots_kernel[(triton.cdiv(count, BLOCK),)](
        state.requests,
        state.lengths,
        state.columns,
        state.targets,
        state.slots,
        row_table,
        row_table.stride(0),
        count,
        BLOCK=BLOCK,
        num_warps=4,
    )


def take_tokens(state: DraftState, drafted: torch.Tensor, drafts: torch.Tensor) -> None:
    """As `reference.take_tokens`; ``drafts`` is contiguous."""
    assert drafts.is_contiguous()
    count = state.requests.shape[0]
    take_tokens_kernel[(triton.cdiv(count, BLOCK),)](
        state.requests,
        state.tokens,
        state.positions,
        state.lengths,
        state.columns,
        state.targets,
        drafted,
        drafts,
        drafts.shape[1],
        count,
        BLOCK=BLOCK,
        num_warps=4,
    )
