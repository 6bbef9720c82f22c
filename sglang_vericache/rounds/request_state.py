"""What the worker remembers of a running request between scheduler steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.metrics import DraftCounters
from sglang_vericache.rounds.agreement import Agreement
from sglang_vericache.tree.view import DraftView


@dataclass(eq=False)
class RequestState:
    """Keyed by request id; dropped when the request gives its row back.

    Attributes:
        row: its row in the request tables.
        obstacle: why it never drafts, or None.
        token_by_token: the host has to see each of its tokens before the next is computed.
        prompt_tokens: committed tokens in its first decode step.
        view: its draft view, once it has one.
        drafted: tokens drafted since the last verification.
        released: it has given its row back; under overlap scheduling one more step of it may be
            under way, whose outcome nobody wants.
        group: whose turn it verifies in.
        counters: the request's own, which outlive this record when it is retracted.
        horizon: most tokens that it drafts before a verification.
        deepest: the same while its full KV is not on the device.
        budget: for its draft view.
        may_grow: its view grows where its drafts fail; not where it asked for a ratio of its own.
        grown: the larger budget that its view has since then, as far as there is memory.
        grows_next: its view is replaced as soon as nothing is drafted over it.
        last_yield, last_reason: tokens of its last round, or of its last plain steps and why
            they were plain.
        full: its row names its whole full KV; else that is detached, or on its way.
        rotates: it is not among those that stay attached.
        memory_generation: count of frees when memory was last refused; asked again only after
            something was freed.
        agreement: how its verifications ended so far.
    """

    rid: str
    row: int
    obstacle: str | None
    group: int
    counters: DraftCounters
    prompt_tokens: int
    horizon: int
    budget: Budget
    released: bool = False
    view: DraftView | None = None
    drafted: int = 0
    last_yield: int = 0
    last_reason: str | None = None
    token_by_token: bool = False
    full: bool = True
    rotates: bool = False
    memory_generation: int = -1
    agreement: Agreement = field(default_factory=Agreement)
    may_grow: bool = False
    grown: Budget | None = None
    grows_next: bool = False
    deepest: int = 0

    @property
    def steady(self) -> bool:
        """Its full KV is on the device and stays there."""
        return self.full and not self.rotates

    def __post_init__(self) -> None:
        self.deepest = max(self.deepest, self.horizon)
