"""Prompts that come back from the host before their prefill, while others decode.

SGLang loads what a prompt matches on the host in its prefill, and nobody decodes until it is there:
a tenth of a second for 32K tokens of an 8B model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_vericache.rounds.held_prompts import HeldPrompts
from sglang_vericache.tree.residency import Residency

# What takes less is not worth the step by which the prefill is put off.
LEAST_S = 0.02


class PromptFetch:
    """Of one scheduler.

    Args:
        least_tokens: on the host, from which a prompt is brought first.
        prefill_tokens: that the link brings while a prefill holds up everybody. With fewer it pays
            more to let several requests in together, whose one prefill brings their prompts.
        held: brings those of requests that wait for that.
    """

    def __init__(
        self,
        residency: Residency,
        least_tokens: int,
        prefill_tokens: Callable[[], float] = lambda: 0.0,
        held: HeldPrompts | None = None,
    ) -> None:
        self.residency, self.least_tokens = residency, least_tokens
        self.prefill_tokens, self.held = prefill_tokens, held
        self._brought = 0
        self._last: str | None = None

    @property
    def brought(self) -> int:
        """Prompts so far."""
        return self._brought + (self.held.brought if self.held is not None else 0)

    def comes_first(self, req: Any, room_tokens: int) -> bool:
        """Whether a waiting request that may be admitted waits for its prompt, which is ordered
        here. Precondition: others decode meanwhile.

        Args:
            room_tokens: that may be taken for its prompt: a load under way cannot be retracted.
        """
        residency = self.residency
        if not residency.loader.alive or not isinstance(req.last_node, int):
            return False
        if self._was_held(req):
            return False  # a prefill waits for the little that may still be on its way
        if residency.comes(req.last_node):
            return True
        if not self._pays(req):
            return False
        if len(req.full_untruncated_fill_ids) > room_tokens:
            return False
        # It has left again for want of room, or could not be brought: its prefill brings it.
        again, self._last = req.rid == self._last, req.rid
        if again or not residency.bring(req.best_match_node):
            return False
        self._brought += 1
        return True

    def concerns(self, req: Any) -> bool:
        """Whether a waiting request's prompt is to come first, comes, or has come."""
        if not isinstance(req.last_node, int) or self._was_held(req):
            return False
        return req.rid == self._last or self.residency.comes(req.last_node) or self._pays(req)

    def _was_held(self, req: Any) -> bool:
        return self.held is not None and req in self.held

    def pays_from(self) -> float:
        """Tokens on the host from which a prompt is brought first."""
        return max(self.least_tokens, self.prefill_tokens())

    def _pays(self, req: Any) -> bool:
        return req.host_hit_length >= self.pays_from()
