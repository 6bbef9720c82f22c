"""Counters of one worker: plain numbers, read by the info endpoint and the response fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class SpanCounters:
    """Life of spans.

    Attributes:
        built: spans selected from a prompt or a whole path.
        folded: spans selected from a tail.
        reused: spans found on the tree and taken into a draft view.
        dropped: spans that lost their node, or were evicted for memory.
        evicted: of the dropped, those that made room for others.
        no_memory: draft views refused because the draft pool was full.
        scored_with_computed: builds scored with queries, or their statistics, of this prefill.
        scored_with_stored: builds that borrowed from what is stored with a node of the path.
        scored_without: builds that fell back to KeyDiff because there were too few queries.
    """

    built: int = 0
    folded: int = 0
    reused: int = 0
    dropped: int = 0
    evicted: int = 0
    no_memory: int = 0
    scored_with_computed: int = 0
    scored_with_stored: int = 0
    scored_without: int = 0


@dataclass
class DraftCounters:
    """Work of drafting and verifying, of one request or of all.

    Attributes:
        rounds: verify passes that a request took part in.
        drafted: draft tokens verified.
        accepted: draft tokens found equal to the full model's, up to the end of the output.
        plain: tokens decoded one by one, by reason.
        rows_read: KV rows read per layer and head, of spans and tails by draft steps and of the
            full KV by verify passes and plain steps.
        rows_full: KV rows that plain decoding would have read for the same tokens.
        draft_rows_limit_exceeded: draft steps that read more than budget, sinks, window and tail;
            anything but 0 is a defect.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    plain: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0
    rows_full: int = 0
    draft_rows_limit_exceeded: int = 0

    @classmethod
    def parse(cls, described: Mapping[str, Any]) -> DraftCounters:
        """Inverse of `describe`."""
        names = ("rounds", "drafted", "accepted", "rows_read", "rows_full")
        counts = {name: described.get(name, 0) for name in names}
        return cls(plain=Counter(described.get("plain", {})), **counts)

    @property
    def round_tokens(self) -> int:
        """Tokens that rounds produced: the accepted ones and one of the full model's a round."""
        return self.accepted + self.rounds

    @property
    def tokens_per_round(self) -> float | None:
        return self.round_tokens / self.rounds if self.rounds else None

    @property
    def tokens(self) -> int:
        return self.round_tokens + sum(self.plain.values())

    def add(self, other: DraftCounters) -> None:
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.plain.update(other.plain)
        self.rows_read += other.rows_read
        self.rows_full += other.rows_full
        self.draft_rows_limit_exceeded += other.draft_rows_limit_exceeded

    def cut(self, tokens: int, rows_full: int) -> None:
        """Take back ``tokens`` that a round yielded past the end of its request.

        Args:
            rows_full: rows that plain decoding would have read for them.
        """
        self.accepted -= tokens
        self.rows_full -= rows_full

    def describe(self) -> dict[str, Any]:
        """Plain values, as the response field and the info endpoint show them."""
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_round": round(self.tokens_per_round, 3) if self.rounds else None,
            "plain": dict(self.plain),
            "rows_read": self.rows_read,
            "rows_full": self.rows_full,
        }


_REQUEST_ATTRIBUTE = "vericache_counters"


def counters_of(req: Any) -> DraftCounters:
    """The counters of a request, kept on SGLang's Req so that they live exactly as long."""
    counters = getattr(req, _REQUEST_ATTRIBUTE, None)
    if counters is None:
        counters = DraftCounters()
        setattr(req, _REQUEST_ATTRIBUTE, counters)
    return counters
