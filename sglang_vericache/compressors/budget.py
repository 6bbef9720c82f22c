"""How many rows of the draft pool the spans of one path may fill."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from sglang_vericache.config import RECENT_TOKENS, SINK_TOKENS, VeriCacheConfig

# Tokens that every selection over a whole path keeps.
ALWAYS_KEPT_TOKENS = SINK_TOKENS + RECENT_TOKENS


@lru_cache(maxsize=1 << 16)
def _share(ratio: float, tokens: int) -> int:
    # As written: 0.07 of 100 tokens is 7, not the 8 that binary dust would round up to.
    return min(math.ceil(Fraction(str(ratio)) * tokens), tokens)


@dataclass(frozen=True)
class Budget:
    """One budget over a whole path, equal for every layer and kv head.

    A row of the draft pool holds one token of each kv head, so rows are counted per head.

    Attributes:
        keep_ratio, keep_tokens: one of the two is None.
        most_rows: never more, whatever the ratio says.
        least_rows: never fewer of a path that has so many tokens, whatever the ratio says.
    """

    keep_ratio: float | None
    keep_tokens: int | None
    most_rows: int | None = None
    least_rows: int = 0

    @classmethod
    def of(cls, config: VeriCacheConfig) -> Budget:
        if config.keep_tokens is not None:
            return cls(None, config.keep_tokens)
        return cls(config.keep_ratio, None, least_rows=config.keep_min_tokens)

    @property
    def without_floor(self) -> Budget:
        """The same where memory is short: a small view drafts better than none."""
        return replace(self, least_rows=0) if self.least_rows else self

    def asked_rows(self, path_tokens: int) -> int:
        """Rows that the settings ask for on a path of ``path_tokens`` tokens."""
        if self.keep_tokens is not None:
            return min(self.keep_tokens, path_tokens)
        rows = max(_share(self.keep_ratio, path_tokens), min(self.least_rows, path_tokens))
        return rows if self.most_rows is None else min(rows, self.most_rows)

    def keeps_at_least(self, other: Budget, path_tokens: int) -> bool:
        """Whether it keeps as many rows as ``other`` of a path of ``path_tokens`` tokens."""
        return self.asked_rows(path_tokens) >= other.asked_rows(path_tokens)

    def path_rows(self, path_tokens: int) -> int:
        """Rows of spans that cover ``path_tokens`` tokens: what is asked, and at least the tokens
        that are always kept."""
        return min(path_tokens, max(self.asked_rows(path_tokens), ALWAYS_KEPT_TOKENS))

    def share_rows(self, tokens: int, path_tokens: int) -> int:
        """What an interval of ``tokens`` tokens gets of the budget of its path."""
        return min(tokens, -(-self.asked_rows(path_tokens) * tokens // path_tokens))

    def limit_rows(self, path_tokens: int) -> int:
        """Never exceeded by the spans that a view is opened with: the budget, the sinks and the
        recent tokens."""
        return min(path_tokens, self.asked_rows(path_tokens) + ALWAYS_KEPT_TOKENS)

    def folded_rows(self, tokens: int, path_tokens: int, before: int) -> int:
        """What is kept of the last ``tokens`` tokens of a path when they are folded.

        With a least number the ratio's part of them, and whatever is missing to that number: its
        share of a short context would be most of these tokens, for which the rows of the path
        before them leave no room.

        Args:
            before: rows of the path's spans.
        """
        rows = self.share_rows(tokens, path_tokens)
        if self.keep_ratio is None:
            return rows
        rows = min(rows, _share(self.keep_ratio, tokens))
        return min(tokens, max(rows, self.least_rows - before))

    def folded_limit_rows(self, path_tokens: int) -> int:
        """Never exceeded by the spans of a path whose tails were folded into it: what
        `folded_rows` says of each comes to the rows that the view was opened with."""
        asked = self.asked_rows(path_tokens)
        if self.keep_ratio is not None and self.least_rows:
            grown = self.least_rows + _share(self.keep_ratio, path_tokens)
            asked = max(asked, grown if self.most_rows is None else min(grown, self.most_rows))
        return min(path_tokens, asked + ALWAYS_KEPT_TOKENS)
