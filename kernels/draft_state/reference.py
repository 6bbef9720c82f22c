"""Moving requests on, in torch."""

from __future__ import annotations

import torch

from sglang_vericache.kernels.draft_state.state import DraftState


def load_requests(
    state: DraftState,
    plan: torch.Tensor,
    requests: torch.Tensor,
    pending: torch.Tensor,
    committed: torch.Tensor,
    drafts: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Set where the first n requests of a state stand, and make the others padding.

    Args:
        plan: ``[n, 3]`` int64: place in the batch, tokens drafted, tokens wanted.
        requests: ``[bs]`` rows of the request tables.
        pending: ``[bs]`` the token of each request whose KV is not computed yet.
        committed: ``[bs]`` tokens of each whose KV is.
        drafts: ``[R, C + 1]`` drafted tokens by request row.
        offsets: ``[R]`` what is added to a path length to have that of the draft view.
    """
    count = plan.shape[0]
    index, done, wanted = plan.unbind(1)
    rows = requests[index]
    last = drafts[rows, (done - 1).clamp(min=0)]
    positions = committed[index] + done
    for target, source in (
        (state.requests, rows),
        (state.tokens, torch.where(done > 0, last, pending[index])),
        (state.positions, positions),
        (state.lengths, positions + offsets[rows] + 1),
        (state.columns, done),
        (state.targets, wanted),
    ):
        target[:count] = source
        target[count:] = 0
    state.lengths[count:] = 1


def find_slots(state: DraftState, row_table: torch.Tensor) -> None:
    """Set ``state.slots`` to the slot of each request's next row; slot 0, which is padding, for
    those that have reached their targets.

    Args:
        row_table: ``[R, W]`` slots of each request's rows.
    """
    slots = row_table[state.requests, state.lengths - 1]
    state.slots.copy_(torch.where(state.columns < state.targets, slots, 0))


def take_tokens(state: DraftState, drafted: torch.Tensor, drafts: torch.Tensor) -> None:
    """Note what a step has drafted, and move the requests on that wanted it.

    Args:
        drafted: ``[B]``.
        drafts: ``[R, C + 1]`` drafted tokens by request row; the last column is padding.
    """
    wants = state.columns < state.targets
    drafts[state.requests, torch.where(wants, state.columns, drafts.shape[1] - 1)] = drafted
    state.tokens.copy_(torch.where(wants, drafted, state.tokens))
    moved = wants.to(torch.int64)
    state.positions.add_(moved)
    state.lengths.add_(moved)
    state.columns.add_(moved)
