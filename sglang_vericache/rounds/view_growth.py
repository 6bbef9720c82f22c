"""Which requests get a larger view, because their drafts fail. Pure.

A request that drafts badly slows itself down: it takes part in every round of its batch, and few
of its tokens stand in each. More of its context in its view costs some memory traffic, and brings
what was missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.rounds.agreement import Agreement

# Below this a round of 7 yields less than 4.9 tokens of 8; above it there is little to gain.
LOW_AGREEMENT = 0.85
# Tokens judged over views of the present size before they say anything: some ten rounds.
JUDGED_TOKENS = 48
# Tokens that must be left to make: a selection costs about as much as a verification.
WORTH_TOKENS = 32
# Kept by the next view, of what the last one kept; what the path allows may be a little less.
GROWTH, LEAST_GROWTH = 2, 1.1
# Tokens of context from which views are selected anew in one step, after the first of them: on a
# GPU some 100 us a layer for each 32K. And so many requests, whose launches take the host's time.
MOST_TOKENS, MOST_REQUESTS = 32_768, 8
# Of the draft pool's slots: these stay free for requests that are yet to come.
LEFT_FREE = 1 / 8


@dataclass(frozen=True)
class Failing:
    """A request whose drafts fail.

    Attributes:
        place: in the batch.
        tokens: of its context.
        rows: of the spans that it would get.
        ready: nothing is drafted over its view, so that it can be replaced now.
    """

    place: int
    agreement: float
    tokens: int
    rows: int
    ready: bool


def drafts_fail(agreement: Agreement, left: int) -> bool:
    """Whether a larger view is worth selecting for a request with ``left`` tokens to make."""
    enough = agreement.judged_at_size >= JUDGED_TOKENS and left >= WORTH_TOKENS
    return enough and agreement.value < LOW_AGREEMENT


def larger(budget: Budget, path_tokens: int, most_rows: int) -> Budget | None:
    """Of twice the share of the path that ``budget`` keeps, or all of it; None where that is not
    much more.

    Args:
        most_rows: that a draft row has room for.
    """
    asked = budget.asked_rows(path_tokens)
    share = math.ceil(1000 * GROWTH * asked / path_tokens) / 1000
    grown = Budget(min(share, 1.0), None, most_rows, budget.least_rows)
    return grown if grown.asked_rows(path_tokens) >= LEAST_GROWTH * asked else None


def choose(failing: Sequence[Failing], spare_rows: int) -> list[int]:
    """Places of those whose views grow, now or, where they are not ready, soon.

    Those that are ready have waited for it; then those that agree least, which gain most.

    Args:
        spare_rows: of the draft pool, promised to nobody. A new span is built while other requests
            may still hold the old one, so that nothing is counted as given back.
    """
    chosen: list[int] = []
    tokens = 0
    for one in sorted(failing, key=lambda f: (not f.ready, f.agreement)):
        if len(chosen) == MOST_REQUESTS or (chosen and tokens + one.tokens > MOST_TOKENS):
            break
        if one.rows <= spare_rows:
            chosen.append(one.place)
            tokens += one.tokens
            spare_rows -= one.rows
    return chosen
