"""What each server of a queued case gets of the device's KV memory: the same bytes.

The unmodified server has one pool, ours a draft pool beside it, which its main pool pays for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.registry import Case
from benchmarks.serving.shapes import PREFIX, SHAPES
from sglang_vericache.compressors.budget import ALWAYS_KEPT_TOKENS, Budget
from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.forecast.shape import Shape, shape_from, shape_of
from sglang_vericache.metrics import RowBytes

# As the server sizes it by itself: no more of the KV memory than this for requests' drafts.
MOST_FOR_DRAFTS = 1 / 4
DRAFT_DTYPE = "int4"


@dataclass(frozen=True)
class Pools:
    """
    Attributes:
        main_tokens: of SGLang's pool.
        draft_bytes: of the draft pool; 0 without one.
    """

    main_tokens: int
    draft_bytes: int = 0

    @property
    def flags(self) -> str:
        main = f"--max-total-tokens {self.main_tokens}"
        return f"{main} --vericache-draft-memory {self.draft_bytes >> 20}MiB"


def shape_for(model: str) -> Shape:
    """Of ``shape:NAME`` or of a checkpoint folder."""
    name = model.removeprefix(PREFIX)
    return shape_from(name, SHAPES[name]) if model.startswith(PREFIX) else shape_of(model)


def row_bytes(model: str) -> RowBytes:
    """Of a token of that model in each pool."""
    import torch

    from sglang_vericache.kernels.pool_format import create_format

    shape = shape_for(model)
    draft = create_format(DRAFT_DTYPE, torch.bfloat16, shape.head_dim).row_bytes(shape.head_dim)
    return RowBytes(draft=shape.rows * draft, full=shape.token_bytes)


def pools(case: Case, row: RowBytes, offloads: bool, weight_bytes: int) -> Pools:
    """Of ours, together no larger than the case's pool.

    With offloading the draft pool holds views of all requests of the case, if that takes no more
    than MOST_FOR_DRAFTS; of fewer where one more then finds room with its full KV, as long as all
    that can usefully run have one. Without, of as many as find room beside it.

    Args:
        weight_bytes: of the model.
    """
    assert case.pool_tokens is not None
    budget = case.pool_tokens * row.full
    splits = [_split(case, row, budget, views) for views in range(1, case.requests + 1)]
    if not offloads:
        holding = [
            split
            for views, split in enumerate(splits, 1)
            if main_tokens(case, views) <= split.main_tokens
        ]
        return holding[-1] if holding else splits[0]
    serving = [
        split
        for views, split in enumerate(splits, 1)
        if views >= min(_useful(case, row, split, weight_bytes), case.requests)
    ]
    return max(serving, key=lambda split: (_attached(case, split), split.draft_bytes))


def _split(case: Case, row: RowBytes, budget: int, views: int) -> Pools:
    draft = min(draft_slots(case, views) * row.draft, int(MOST_FOR_DRAFTS * budget))
    draft = math.ceil(draft / (1 << 20)) << 20  # the flag's unit
    return Pools((budget - draft) // row.full, draft)


def _useful(case: Case, row: RowBytes, split: Pools, weight_bytes: int) -> int:
    """Requests that can usefully run, by the server's own rule."""
    from sglang_vericache.pool.sizing import HostTier

    tier = HostTier(1 << 60, None, weight_bytes)
    tokens = tier.running_tokens(split.main_tokens, row.full)
    return math.ceil(case.requests * tokens / main_tokens(case, case.requests))


def _attached(case: Case, split: Pools) -> int:
    """Requests whose full KV the main pool holds, with room for the reserves of a few steps."""
    spare = 4 * VeriCacheConfig().verify_width
    counts = range(1, case.requests + 1)
    return sum(main_tokens(case, n) + n * spare <= split.main_tokens for n in counts)


def main_tokens(case: Case, requests: int) -> int:
    """Of the full KV of so many of the case's requests."""
    own = case.context - case.shared_tokens + case.tokens
    return _prefixes(case, requests) * case.shared_tokens + requests * own


def draft_slots(case: Case, requests: int) -> int:
    """For the views of so many requests at the server's default settings.

    Who shares a prefix shares its span; the first of them has one of its own over its whole path.
    One more path is selected anew while its old spans are still there.
    """
    config = VeriCacheConfig()
    budget = Budget.of(config)
    whole = budget.limit_rows(case.context + case.tokens)
    tails = requests * config.tail_capacity
    if not case.prefixes:
        return (requests + 1) * whole + tails
    prefixes = _prefixes(case, requests)
    own_tokens, tokens = case.context - case.shared_tokens + case.tokens, case.context + case.tokens
    own = budget.share_rows(own_tokens, tokens) + ALWAYS_KEPT_TOKENS
    return (2 * prefixes + 1) * whole + (requests - prefixes) * own + tails


def _prefixes(case: Case, requests: int) -> int:
    return math.ceil(requests * case.prefixes / case.requests)


def pool_note(mine: str, theirs: str) -> str | None:
    """What a row says of two servers' flags; None where the pools are what the card leaves."""
    main, other = (_last(flags, "--max-total-tokens") for flags in (mine, theirs))
    draft = _last(mine, "--vericache-draft-memory")
    if main is None or other is None:
        return None
    beside = f" and a draft pool of {draft}" if draft else ""
    its = _last(theirs, "--vericache-draft-memory")
    return (
        f"KV memory: a main pool of {main} tokens{beside} (baseline {other} tokens"
        f"{f' and {its}' if its else ''})"
    )


def _last(flags: str, name: str) -> str | None:
    """The value that counts."""
    given = dict(pairwise(flags.split()))
    return given.get(name)
