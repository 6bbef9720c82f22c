"""Plan of one scheduler step. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A running request as the policy sees it.

    Attributes:
        index: its place in the batch.
        drafts: it has a draft view and nothing that drafting cannot serve.
        drafted: tokens drafted since its last verification.
        room: most tokens it may have drafted before the next one: the horizon, less near the end
            of its output or of the context.
        group: whose turn it verifies in.
    """

    index: int
    drafts: bool
    drafted: int
    room: int
    group: int


@dataclass(frozen=True)
class RoundPlan:
    """What each request of a batch does in this scheduler step.

    Attributes:
        plain: indices decoded by one token over the full KV. These never sit out a step: SGLang
            counts penalties once a step.
        draft: (index, tokens to draft now).
        verify: (index, tokens drafted by then); the others that draft accept nothing.
    """

    plain: tuple[int, ...]
    draft: tuple[tuple[int, int], ...]
    verify: tuple[tuple[int, int], ...]


def plan_step(candidates: Sequence[Candidate], step: int, horizon: int, groups: int) -> RoundPlan:
    """Draft for everyone who may, verify the group whose turn it is.

    With one group every request drafts its horizon and verifies in the same step. With more, a
    request drafts a share of its horizon in each step and verifies when its turn comes, so that
    at any step one group's full KV is needed.
    """
    plain: list[int] = []
    draft: list[tuple[int, int]] = []
    waiting: list[tuple[int, int]] = []
    verify: list[tuple[int, int]] = []
    share = math.ceil(horizon / groups)
    for candidate in candidates:
        if not candidate.drafts or candidate.room <= 0:
            plain.append(candidate.index)
            continue
        count = min(share, candidate.room - candidate.drafted)
        if count > 0:
            draft.append((candidate.index, count))
        drafted = candidate.drafted + max(count, 0)
        turn = step % groups == candidate.group
        (verify if turn else waiting).append((candidate.index, drafted))
    if not plain and not draft and not verify:
        verify = waiting  # nobody would move
    return RoundPlan(tuple(plain), tuple(draft), tuple(verify))
