"""Into how many scheduler steps a round is cut, so that none of them is too long. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A round takes at most so many steps.
MOST_PARTS = 4


@dataclass(frozen=True)
class Cut:
    """Attributes:
    steps: of a round.
    share: most tokens to draft in one of them.
    behind: the same of the step that verifies, where that drafts for the next round.
    """

    steps: int
    share: int
    behind: int


def cut_evenly(horizon: int, whole_s: float, longest_s: float) -> Cut:
    """Whatever takes the time.

    Args:
        whole_s: of the round in one step.
    """
    steps = int(min(max(-(-whole_s // longest_s), 1), MOST_PARTS, horizon))
    share = math.ceil(horizon / steps)
    return Cut(steps, share, share)


def cut_ahead(horizon: int, verify_s: float, draft_s: float, longest_s: float) -> Cut:
    """Where the step that verifies drafts the next round's first tokens behind it.

    It drafts what fits, but one token at least: the device would idle until the next step. The
    others share what is left. Where that needs too many of them, all steps are about equally long.

    Args:
        verify_s: of a step that drafts nothing; draft_s: of one draft step.
    """

    def behind(step_s: float) -> int:
        return int(min(max((step_s - verify_s) // draft_s, 1), horizon))

    first = behind(longest_s)
    fitting = max(longest_s // draft_s, 1)
    others = math.ceil((horizon - first) / fitting)
    if others >= MOST_PARTS:
        first = max(behind((verify_s + horizon * draft_s) / MOST_PARTS), first)
        others = MOST_PARTS - 1
    if not others:
        return Cut(1, horizon, horizon)
    share = math.ceil((horizon - first) / others)
    # Rounding up may leave nothing for the last.
    return Cut(1 + math.ceil((horizon - first) / share), share, first)
