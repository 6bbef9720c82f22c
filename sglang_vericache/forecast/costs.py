"""What steps and rounds take of requests that all stay on the device, and how many fit. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sglang_vericache.forecast.hardware import Card
from sglang_vericache.forecast.load import Draft, Load
from sglang_vericache.forecast.shape import Shape
from sglang_vericache.forecast.timing import Timing
from sglang_vericache.loader.planner import Costs
from sglang_vericache.rounds.controller import PLAIN

# The scheduler's own work in a step: beside one that drafts; and what a plain one takes at least.
STEP_S = 1.5e-3
# The draft pool beside the main pool, in bytes, as the server sizes it (pool/sizing.py) for a fifth
# of the tokens in four bits.
DRAFT_POOL = 0.1
# A scheduler step is kept to about this long: drafting a round takes several.
LONGEST_STEP_S = 30e-3


def best_horizon(
    timing: Timing, draft: Draft, requests: int, context: float, choices: Iterable[int]
) -> tuple[int, float]:
    """Which of some horizons, PLAIN for none, brings the most tokens a second to requests that all
    stay, and the seconds of a round of it."""
    step_s = timing.draft(requests, context, draft.kept)
    seconds = {}
    for horizon in choices:
        if horizon == PLAIN:
            seconds[PLAIN] = max(timing.plain(requests, context), STEP_S)
            continue
        verify_s = timing.verify(requests, context, horizon + 1)
        seconds[horizon] = horizon * step_s + verify_s + steps_of(horizon, step_s) * STEP_S
    best = max(seconds, key=lambda horizon: draft.tokens(horizon) / seconds[horizon])
    return best, seconds[best]


def steps_of(horizon: int, draft_step_s: float) -> int:
    """Scheduler steps that drafting so many tokens takes; one where none is drafted."""
    return max(1, math.ceil(horizon / max(1, int(LONGEST_STEP_S / draft_step_s))))


def costs_of(shape: Shape, card: Card, load: Load, capacity: int, draft: Draft) -> Costs:
    """Of requests that all stay attached, as many as fit."""
    timing = Timing(shape, card)
    fits = max(1, min(load.requests, capacity // (load.context + load.output)))
    context = fits * load.context
    horizon, round_s = best_horizon(timing, draft, fits, context, draft.horizons)
    steps = steps_of(horizon, timing.draft(fits, context, draft.kept))
    return Costs(
        fits,
        round_s,
        round_s / steps,
        timing.verify(1, load.context, draft.horizon + 1),
        timing.loading(load.context),
        draft.tokens(horizon),
        draft.yields,
        draft.tokens(draft.deepest),
    )


def pool_tokens(shape: Shape, card: Card, fraction: float = 0.85) -> int:
    """Tokens of KV memory beside the weights."""
    room = card.memory_bytes * fraction - shape.weight_bytes
    return max(int(room / shape.token_bytes), 0)


def beside_draft_pool(tokens: int) -> int:
    """Of KV memory for so many tokens, those of the main pool where a draft pool takes its part."""
    return int(tokens / (1 + DRAFT_POOL))
