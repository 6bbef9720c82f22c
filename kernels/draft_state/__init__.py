"""Where each request stands between draft steps."""

from __future__ import annotations

import torch

from sglang_vericache.kernels.dispatch import runs_triton
from sglang_vericache.kernels.draft_state import reference
from sglang_vericache.kernels.draft_state.state import DraftState

__all__ = ["DraftState", "find_slots", "load_requests", "take_tokens"]


def load_requests(
    state: DraftState,
    plan: torch.Tensor,
    requests: torch.Tensor,
    pending: torch.Tensor,
    committed: torch.Tensor,
    drafts: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """See `reference.load_requests`."""
    if not runs_triton(drafts):
        return reference.load_requests(state, plan, requests, pending, committed, drafts, offsets)
    from sglang_vericache.kernels.draft_state import triton

    return triton.load_requests(state, plan, requests, pending, committed, drafts, offsets)


def find_slots(state: DraftState, row_table: torch.Tensor) -> None:
    """See `reference.find_slots`."""
    if not runs_triton(row_table):
        return reference.find_slots(state, row_table)
    from sglang_vericache.kernels.draft_state import triton

    return triton.find_slots(state, row_table)


def take_tokens(state: DraftState, drafted: torch.Tensor, drafts: torch.Tensor) -> None:
    """See `reference.take_tokens`."""
    if not runs_triton(drafted):
        return reference.take_tokens(state, drafted, drafts)
    from sglang_vericache.kernels.draft_state import triton

    return triton.take_tokens(state, drafted, drafts)
