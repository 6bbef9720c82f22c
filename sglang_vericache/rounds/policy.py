"""Plan of one scheduler step. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)  # made for every request in every step: frozen ones take six times as long
class Candidate:
    """A running request as the policy sees it.

    Attributes:
        index: its place in the batch.
        drafts: it has a draft view and nothing that drafting cannot serve.
        drafted: tokens drafted since its last verification.
        room: most tokens it may have drafted before the next one: the horizon, or what it drafts
            while it waits for its full KV; less near the end of its output or of the context.
        group: whose turn it verifies in.
        full: its full KV can be read now; else it drafts, and accepts nothing.
        rotates: its full KV is to leave again: it is verified as soon as it has drafted enough,
            whatever round the others are in.
        enough: tokens drafted with which a rotating request whose full KV has come is verified: its
            place on the device is worth more than what it would draft there. Until it comes it
            drafts up to ``room``.
        ahead: most tokens that it may draft for its next round before this one's outcome is known.
    """

    index: int
    drafts: bool
    drafted: int
    room: int
    group: int
    full: bool = True
    rotates: bool = False
    ahead: int = 0
    enough: int = 1 << 30


@dataclass(frozen=True)
class RoundPlan:
    """What each request of a batch does in this scheduler step.

    Attributes:
        plain: indices decoded token by token over the full KV. These never sit out a step:
            SGLang counts penalties once a step.
        draft: (index, tokens to draft now).
        verify: (index, tokens drafted by then); the others that draft accept nothing.
        ahead: (index, tokens to draft behind the verification, for the next round).
        ends_round: nothing drafted is left unverified by it, of those that do not rotate.
    """

    plain: tuple[int, ...]
    draft: tuple[tuple[int, int], ...]
    verify: tuple[tuple[int, int], ...]
    ends_round: bool = True
    ahead: tuple[tuple[int, int], ...] = ()

    @property
    def drafts(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """``draft`` in two parts: before what reads full KV and behind it.

        Behind it where nobody verifies what is drafted in this step: the host, which waits for
        the yields, prepares the next step meanwhile. Never in two passes.
        """
        verifies = {index for index, _ in self.verify}
        if any(index in verifies for index, _ in self.draft):
            return self.draft, ()
        return (), self.draft

    @property
    def most_drafted(self) -> int:
        """In this step, of a request."""
        return max((count for _, count in (*self.draft, *self.ahead)), default=0)

    @property
    def most_verified(self) -> int:
        """Drafted tokens of a request."""
        return max((count for _, count in self.verify), default=0)

    @property
    def only_plain(self) -> bool:
        return bool(self.plain) and not self.draft and not self.verify


def plan_step(
    candidates: Sequence[Candidate],
    step: int,
    horizon: int,
    groups: int,
    share: int | None = None,
) -> RoundPlan:
    """Draft for everyone who may, verify whose turn it is.

    With one group all requests are in the same round: everyone drafts up to ``share`` tokens a
    step, and all verify in the step in which those furthest ahead have drafted all they may. Who
    joins in the middle of a round verifies with the others what it has by then.

    With more groups a request drafts a group's part of its horizon in each step and verifies when
    its group's turn comes, so that at any step one group's full KV is needed.

    Args:
        share: most tokens to draft in one step; a whole round when None.
    """
    part = math.ceil(horizon / groups)
    share = part if share is None else min(part, share)
    plain: list[int] = []
    draft: list[tuple[int, int]] = []
    drafting: list[tuple[Candidate, int]] = []
    rotating: list[tuple[int, int]] = []
    for candidate in candidates:
        if not candidate.drafts or candidate.room <= 0:
            if candidate.full:
                plain.append(candidate.index)
            continue
        away = candidate.rotates or not candidate.full
        most = max(share, 1) if candidate.rotates else share
        enough = min(candidate.room, candidate.enough)
        limit = enough if away and candidate.full else candidate.room
        count = min(most, limit - candidate.drafted)
        if count > 0:
            draft.append((candidate.index, count))
        # Of what was drafted ahead some may lie beyond the end of the output by now.
        drafted = min(candidate.drafted + max(count, 0), candidate.room)
        if away:
            if candidate.full and drafted >= enough:
                rotating.append((candidate.index, drafted))
            continue
        drafting.append((candidate, drafted))
    if groups == 1:
        furthest = max((drafted for _, drafted in drafting), default=0)
        goes_on = any(d == furthest and d < c.room for c, d in drafting)
        verify = [] if goes_on else [(c.index, d) for c, d in drafting]
    else:
        verify = [(c.index, d) for c, d in drafting if step % groups == c.group]
    if not plain and not draft and not verify and not rotating:
        verify = [(c.index, d) for c, d in drafting]  # nobody would move
    drafts = {index for index, _ in draft}
    goes_on = not verify and any(c.index in drafts for c, _ in drafting)
    return RoundPlan(tuple(plain), tuple(draft), (*verify, *rotating), not goes_on)


def plan_ahead(candidates: Sequence[Candidate], share: int, behind: int | None = None) -> RoundPlan:
    """Verify what earlier steps drafted, and draft for the next round behind it.

    The device drafts while the host reads the yields and prepares the next step, which it could
    not do if a verification came last. All requests are in the same round: a step that finds those
    furthest ahead with all they may draft verifies everybody who has drafted something, and drafts
    the first tokens of the next round; any other step only drafts.

    Args:
        share: most tokens to draft in a step that only drafts.
        behind: the same behind a verification, which takes its time as well; ``share`` when None.

    Precondition: the full KV of all candidates is on the device, and none rotates.
    """
    drafting = [c for c in candidates if c.drafts and c.room > 0]
    plain = tuple(c.index for c in candidates if not (c.drafts and c.room > 0))
    furthest = max((c.drafted for c in drafting), default=0)
    complete = furthest > 0 and all(c.drafted >= c.room for c in drafting if c.drafted == furthest)
    if not complete:
        shares = ((c.index, min(share, c.room - c.drafted)) for c in drafting)
        draft = tuple((index, count) for index, count in shares if count > 0)
        return RoundPlan(plain, draft, (), ends_round=not draft)
    verify = tuple((c.index, min(c.drafted, c.room)) for c in drafting if c.drafted)
    behind = share if behind is None else behind
    rooms = ((c.index, min(behind, c.ahead if c.drafted else c.room)) for c in drafting)
    ahead = tuple((index, count) for index, count in rooms if count > 0)
    return RoundPlan(plain, (), verify, ahead=ahead)
