"""Counters of one worker: plain numbers, read by the info endpoint and the response fields."""

from __future__ import annotations

from collections import defaultdict
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
        views_grown: draft views replaced by larger ones because drafts over them failed.
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
    views_grown: int = 0
    scored_with_computed: int = 0
    scored_with_stored: int = 0
    scored_without: int = 0


@dataclass(frozen=True)
class RowBytes:
    """What one KV row weighs over all layers and heads: the draft pool may store less of it."""

    draft: int
    full: int


def _tally() -> defaultdict[Any, int]:
    """Counts by name, where Counter would cost."""
    return defaultdict(int)


@dataclass
class DraftCounters:
    """Work of drafting and verifying, of one request or of all.

    Rows are KV rows read per layer and kv head.

    Attributes:
        rounds: verify passes that a request took part in.
        drafted: draft tokens verified.
        accepted: draft tokens found equal to the full model's, up to the end of the output.
        yields: rounds by the tokens that they produced, the full model's own one included.
        plain: tokens decoded one by one, by reason.
        draft_rows_read: rows of spans and tails, by draft steps.
        full_rows_read: rows of the full KV, by verify passes and plain steps.
        rows_full: rows of the full KV that plain decoding would have read for the same tokens.
        draft_rows_limit_exceeded: draft steps that read more than budget, sinks, window and tail;
            anything but 0 is a defect.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    yields: defaultdict[int, int] = field(default_factory=_tally)
    plain: defaultdict[str, int] = field(default_factory=_tally)
    draft_rows_read: int = 0
    full_rows_read: int = 0
    rows_full: int = 0
    draft_rows_limit_exceeded: int = 0

    @classmethod
    def parse(cls, described: Mapping[str, Any]) -> DraftCounters:
        """Inverse of `describe`, as far as that tells."""
        names = ("rounds", "drafted", "accepted", "draft_rows_read", "full_rows_read", "rows_full")
        counts = {name: described.get(name, 0) for name in names}
        return cls(plain=defaultdict(int, described.get("plain", {})), **counts)

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

    @property
    def rows_read(self) -> int:
        return self.draft_rows_read + self.full_rows_read

    def bytes_read(self, row_bytes: RowBytes) -> int:
        return self.draft_rows_read * row_bytes.draft + self.full_rows_read * row_bytes.full

    def bytes_full(self, row_bytes: RowBytes) -> int:
        """Bytes that plain decoding would have read."""
        return self.rows_full * row_bytes.full

    def count_round(self, drafted: int, tokens: int) -> None:
        """A round of so many draft tokens produced ``tokens``."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += tokens - 1
        self.yields[tokens] += 1

    def count_rows(self, draft: int, full: int, plain: int) -> None:
        """Rows that were read, and that plain decoding would have read for the same tokens."""
        self.draft_rows_read += draft
        self.full_rows_read += full
        self.rows_full += plain

    def add(self, other: DraftCounters) -> None:
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
        for tokens, rounds in other.yields.items():
            self.yields[tokens] += rounds
        for reason, tokens in other.plain.items():
            self.plain[reason] += tokens
        self.draft_rows_read += other.draft_rows_read
        self.full_rows_read += other.full_rows_read
        self.rows_full += other.rows_full
        self.draft_rows_limit_exceeded += other.draft_rows_limit_exceeded

    def cut(self, tokens: int, rows_full: int, round_tokens: int, reason: str | None) -> None:
        """Take back ``tokens`` that a step yielded past the end of its request.

        Args:
            rows_full: rows that plain decoding would have read for them.
            round_tokens: tokens that the step was counted with.
            reason: why they were decoded plainly, or None for those of a round.
        """
        self.rows_full -= rows_full
        if reason is not None:
            self.plain[reason] -= tokens
            return
        self.accepted -= tokens
        self.yields[round_tokens] -= 1
        self.yields[round_tokens - tokens] += 1

    def accepted_histogram(self) -> list[int]:
        """At index n the rounds in which n draft tokens were accepted."""
        most = max((tokens for tokens, rounds in self.yields.items() if rounds), default=0)
        return [self.yields[tokens] for tokens in range(1, most + 1)]

    def describe(self, row_bytes: RowBytes) -> dict[str, Any]:
        """Plain values, as the response field and the info endpoint show them."""
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_round": round(self.tokens_per_round, 3) if self.rounds else None,
            "plain": dict(self.plain),
            "draft_rows_read": self.draft_rows_read,
            "full_rows_read": self.full_rows_read,
            "rows_read": self.rows_read,
            "rows_full": self.rows_full,
            "bytes_read": self.bytes_read(row_bytes),
            "bytes_full": self.bytes_full(row_bytes),
        }


@dataclass(frozen=True)
class OffloadNumbers:
    """The full KV of running requests leaving the device and coming back; all 0 where it stays.

    Attributes:
        active: it may leave: there is a host tier, and the loader thread lives.
        attached, detached, fetching: running requests by where their full KV is.
        waiting: of those, the ones that have drafted all they may.
        detachments, attachments: moves so far.
        fetches, fetched_tokens, fetched_bytes: that arrived.
        fetch_seconds: that the copies took, one after the other.
        failed: copies that were repeated.
        late: copies that the scheduler made itself because the loader did not.
        cancelled: fetches withdrawn before they began.
        corrupt, corrupt_tokens: fetches that brought something else than what was written, and so
            many tokens of theirs.
        recomputed_tokens: computed again for that.
        prompts: brought from the host before their prefill, while others decoded.
    """

    active: bool = False
    attached: int = 0
    detached: int = 0
    fetching: int = 0
    waiting: int = 0
    detachments: int = 0
    attachments: int = 0
    fetches: int = 0
    fetched_tokens: int = 0
    fetched_bytes: int = 0
    fetch_seconds: float = 0.0
    failed: int = 0
    late: int = 0
    cancelled: int = 0
    corrupt: int = 0
    corrupt_tokens: int = 0
    recomputed_tokens: int = 0
    prompts: int = 0


@dataclass(frozen=True)
class Numbers:
    """Everything that the metrics endpoint shows of one worker.

    Attributes:
        drafting: whether drafting is switched on.
        phase_seconds: time by phase of the scheduler step.
        rounds_ahead: steps that drafted the next round behind a verification.
        shared_tokens: of context that verifications did not read again, because requests share it.
    """

    drafting: bool
    total: DraftCounters
    row_bytes: RowBytes
    spans: SpanCounters
    pool_used_tokens: int
    pool_tokens: int
    phase_seconds: Mapping[str, float]
    rounds_ahead: int = 0
    shared_tokens: int = 0
    offload: OffloadNumbers = OffloadNumbers()


_REQUEST_ATTRIBUTE = "vericache_counters"


def counters_of(req: Any) -> DraftCounters:
    """The counters of a request, kept on SGLang's Req so that they live exactly as long."""
    counters = getattr(req, _REQUEST_ATTRIBUTE, None)
    if counters is None:
        counters = DraftCounters()
        setattr(req, _REQUEST_ATTRIBUTE, counters)
    return counters
