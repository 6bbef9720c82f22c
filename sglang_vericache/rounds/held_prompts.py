"""Prompts of requests that wait for others to be let in with them (rounds/admission.py).

Their one prefill would bring all of them from the host, and nobody decodes until they are there. So
they come while the requests wait, in the order of the queue, as far as there is memory for them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from sglang_vericache.loader.planner import Place
from sglang_vericache.tree.residency import Residency

# Fewer tokens come in no time.
LEAST_TOKENS = 512
# Requests whose prompts are known to have been brought: more than are ever held.
REMEMBERED = 256


def load_reserve(residency: Residency, verify_width: int) -> int:
    """Tokens that running requests, and one more, may take until a load is there, which cannot be
    retracted.

    Args:
        verify_width: main slots that each may take in a step.
    """
    return 2 * verify_width * (len(residency) + 1)


class HeldPrompts:
    """Of one scheduler, which asks about its waiting requests one by one in each pass.

    Args:
        verify_width: main slots that a running request may take in a step.
        least_tokens: on the host, from which a prompt is brought.
        most_tokens: from which its request waits for it, as any other does (`PromptFetch`): a
            prefill would wait for it too long.

    Attributes:
        brought: prompts so far.
    """

    def __init__(
        self,
        residency: Residency,
        verify_width: int,
        least_tokens: int = LEAST_TOKENS,
        most_tokens: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.residency, self.verify_width = residency, verify_width
        self.least_tokens, self.most_tokens = least_tokens, most_tokens
        self.brought = 0
        self._known: deque[str] = deque(maxlen=REMEMBERED)
        self._first = ""  # of the queue, which waits
        self._seen = 0  # waiting requests that have been asked about since then
        self._places = 0  # of this pass, waiting requests that there is memory for

    def __contains__(self, req: Any) -> bool:
        """Whether a waiting request's prompt was brought, or is on its way, for that it waits."""
        return req.rid in self._known

    def begin_pass(self) -> None:
        self._places = 0

    def fitting(self, req: Any, remaining: int, growth: int) -> int:
        """Requests like the first of the queue for which there is memory.

        Args:
            remaining: tokens that the scheduler has left to admit.
            growth: that it may take beside its prompt.
        """
        tokens = len(req.full_untruncated_fill_ids)
        if req in self:  # what was brought for it is locked on its way, and free afterwards
            remaining += self.residency.tokens_on_the_way
        else:  # what the device has of it may be locked by others
            tokens -= req.prefix_len
        return remaining // max(tokens + growth, 1)

    def hold(self, req: Any, fitting: int, remaining: int) -> None:
        """The first of the queue waits, and there is memory for so many like it."""
        if req.rid != self._first:
            self._first, self._seen = req.rid, 0
        if any(seat.place is not Place.ATTACHED for seat in self.residency.seats()):
            return  # what there is memory for is theirs
        self._places = fitting if fitting > self._seen else 0
        self._seen = fitting
        if self._places:
            self.pass_over(req, remaining)

    def let_go(self) -> None:
        """The first of the queue need not wait any longer."""
        self._seen = 0

    @property
    def looks_on(self) -> bool:
        """Whether the next request of the queue is to be asked about in this pass."""
        return self._places > 0

    def pass_over(self, req: Any, remaining: int) -> None:
        """It waits as well; its prompt is ordered if it is on the host."""
        self._places -= 1
        missing = req.host_hit_length
        if missing < self.least_tokens or not isinstance(req.last_node, int):
            return
        residency = self.residency
        reserve = load_reserve(residency, self.verify_width)
        if missing + reserve > remaining or not residency.loader.alive:
            self._places = 0
        elif not residency.comes(req.last_node) and residency.bring(req.best_match_node):
            self.brought += 1
            if missing < self.most_tokens():
                self._known.append(req.rid)
