"""Prompts that come back from the host before their prefill, while others decode.

SGLang loads what a prompt matches on the host in its prefill, and nobody decodes until it is there:
a tenth of a second for 32K tokens of an 8B model.
"""

from __future__ import annotations

from typing import Any

from sglang_vericache.tree.residency import Residency

# What takes less is not worth the step by which the prefill is put off.
LEAST_S = 0.02


class PromptFetch:
    """Of one scheduler.

    Args:
        least_tokens: on the host, from which a prompt is brought first.

    Attributes:
        brought: prompts so far.
    """

    def __init__(self, residency: Residency, least_tokens: int) -> None:
        self.residency, self.least_tokens = residency, least_tokens
        self.brought = 0
        self._last: str | None = None

    def comes_first(self, req: Any, room_tokens: int) -> bool:
        """Whether a waiting request that may be admitted waits for its prompt, which is ordered
        here. Precondition: others decode meanwhile.

        Args:
            room_tokens: that may be taken for its prompt: a load under way cannot be retracted.
        """
        residency = self.residency
        if not residency.loader.alive or not isinstance(req.last_node, int):
            return False
        if residency.comes(req.last_node):
            return True
        if not self.least_tokens <= req.host_hit_length:
            return False
        if len(req.full_untruncated_fill_ids) > room_tokens:
            return False
        # It has left again for want of room, or could not be brought: its prefill brings it.
        again, self._last = req.rid == self._last, req.rid
        if again or not residency.bring(req.best_match_node):
            return False
        self.brought += 1
        return True
