"""draft_state against the same steps taken one request at a time."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from pools import DEVICE

from sglang_vericache.kernels.draft_state import (
    DraftState,
    find_slots,
    load_requests,
    take_tokens,
)

ROWS, WIDTH, HORIZON = 600, 50, 6
SIZES = pytest.mark.parametrize("size", [1, 3, 127, 128, 129, 300])


def column(numbers) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device=DEVICE)


def some_state(size: int) -> DraftState:
    """Requests in shuffled rows; every third has reached its target."""
    state = DraftState.zeros(size, torch.device(DEVICE))
    state.requests.copy_(torch.randperm(ROWS - 1)[:size] + 1)
    state.tokens.copy_(torch.randint(0, 1000, (size,)))
    state.positions.copy_(torch.randint(0, 9000, (size,)))
    state.lengths.copy_(torch.randint(1, WIDTH + 1, (size,)))
    state.columns.copy_(torch.arange(size) % HORIZON)
    state.targets.copy_(state.columns + (torch.arange(size) % 3).clamp(max=1).to(DEVICE))
    state.slots.fill_(-7)
    return state


def lists(state: DraftState) -> dict[str, list[int]]:
    return {field.name: getattr(state, field.name).tolist() for field in fields(state)}


@SIZES
def test_slots_of_the_next_rows(size):
    """Catches the row after the last, another request's row, and a slot for a request that wants
    nothing more: its keys would overwrite what it has."""
    table = torch.randint(1, 10_000, (ROWS, WIDTH), dtype=torch.int32, device=DEVICE)
    state = some_state(size)
    before = lists(state)
    find_slots(state, table)
    rows = table.tolist()
    wanted = [
        rows[request][length - 1] if done < target else 0
        for request, length, done, target in zip(
            before["requests"], before["lengths"], before["columns"], before["targets"], strict=True
        )
    ]
    assert lists(state) == before | {"slots": wanted}


@SIZES
def test_tokens_are_taken(size):
    """Catches a token in another request's row or column, and one that has reached its target and
    moves on."""
    state = some_state(size)
    drafts = torch.full((ROWS, HORIZON + 1), -1, dtype=torch.int64, device=DEVICE)
    drafted = torch.randint(2000, 3000, (size,), device=DEVICE)
    wanted, rows = lists(state), drafts.tolist()
    for i, token in enumerate(drafted.tolist()):
        request, done = wanted["requests"][i], wanted["columns"][i]
        if done == wanted["targets"][i]:
            rows[request][HORIZON] = token
            continue
        rows[request][done] = token
        wanted["tokens"][i] = token
        for name in ("positions", "lengths", "columns"):
            wanted[name][i] += 1
    take_tokens(state, drafted, drafts)
    assert lists(state) == wanted
    assert drafts.tolist() == rows


@SIZES
@pytest.mark.parametrize("padding", [0, 5, 140])
def test_requests_are_loaded(size, padding):
    """Catches what is left of the requests before, a pending token where some are drafted, and
    lengths of the path in place of the view's."""
    batch = size + 10
    requests = torch.randperm(ROWS - 1)[:batch] + 1
    pending, committed = torch.randint(0, 1000, (2, batch))
    offsets = torch.randint(-40, 1, (ROWS,))
    drafts = torch.randint(1000, 2000, (ROWS, HORIZON + 1))
    plan = torch.stack(
        [
            torch.randperm(batch)[:size],
            torch.randint(0, 3, (size,)),
            torch.randint(3, HORIZON + 1, (size,)),
        ],
        dim=1,
    )
    wanted: dict[str, list[int]] = {field.name: [] for field in fields(DraftState)}
    for index, done, target in plan.tolist():
        request = int(requests[index])
        token = int(drafts[request, done - 1]) if done else int(pending[index])
        position = int(committed[index]) + done
        length = position + int(offsets[request]) + 1
        for name, value in zip(
            wanted, (request, token, position, length, done, target, -7), strict=True
        ):
            wanted[name].append(value)
    for name, values in wanted.items():
        values += [1 if name == "lengths" else -7 if name == "slots" else 0] * padding
    state = some_state(size + padding)
    load_requests(
        state, *(t.to(DEVICE) for t in (plan, requests, pending, committed, drafts, offsets))
    )
    assert lists(state) == wanted


def test_padding_alone():
    """Before graphs are captured."""
    none = column([])
    state = some_state(4)
    drafts = torch.zeros(ROWS, HORIZON + 1, dtype=torch.int64, device=DEVICE)
    load_requests(state, none.view(0, 3), none, none, none, drafts, drafts[:, 0].contiguous())
    assert state.lengths.tolist() == [1] * 4
    assert state.requests.tolist() == state.targets.tolist() == [0] * 4


def test_slices_and_other_integers():
    """Catches a batch whose lengths are 32-bit numbers, or a column of a wider tensor."""
    state = some_state(2)
    drafts = torch.zeros(ROWS, HORIZON + 1, dtype=torch.int64, device=DEVICE)
    wide = torch.tensor([[7, 70], [8, 80]], device=DEVICE)
    load_requests(
        state,
        torch.tensor([[1, 0, 3], [0, 0, 2]], device=DEVICE),
        column([3, 4]),
        wide[:, 1],
        torch.tensor([100, 200], dtype=torch.int32, device=DEVICE),
        drafts,
        column([0] * ROWS),
    )
    assert state.tokens.tolist() == [80, 70]
    assert state.positions.tolist() == [200, 100]
