"""What forwards and prefills take: launches, bytes and products. Pure.

The constants are of what ran on H200s (benchmarks/results/h200-ninth-run.md); shares of a card's
rates are taken to be the same on others.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_vericache.forecast.hardware import Card
from sglang_vericache.forecast.shape import Shape

# A layer's eleven kernels wait for each other, 3 us each, whatever they compute.
LAYER_S = 33e-6
# A layer of a prefill that is launched from Python.
PREFILL_LAYER_S = 0.9e-3


@dataclass(frozen=True)
class Reading:
    """Share of the memory's rate at which attention reads KV.

    Attributes:
        plain, verify: the full KV, for one query a request and for several.
        draft: the compressed one.
    """

    plain: float
    verify: float
    draft: float


# By head_dim: below 128, and from there on.
NARROW, WIDE = Reading(0.67, 0.63, 0.5), Reading(0.97, 0.7, 0.6)


class Timing:
    """Of a model on a card, in seconds.

    Args of all forwards:
        context: tokens of all requests together whose full KV is meant.
    """

    def __init__(self, shape: Shape, card: Card) -> None:
        self.shape, self.card = shape, card
        self.reading = NARROW if shape.head_dim < 128 else WIDE

    def plain(self, requests: int, context: float) -> float:
        """A token of each."""
        return self._forward(requests, context * self.shape.token_bytes / self.reading.plain)

    def draft(self, requests: int, context: float, kept: float) -> float:
        """A draft step; ``kept``: share of the KV bytes that it reads."""
        kv_bytes = context * self.shape.token_bytes * kept
        return self._forward(requests, kv_bytes / self.reading.draft)

    def verify(self, requests: int, context: float, width: int) -> float:
        """A pass over ``width`` tokens of each."""
        kv_bytes = context * self.shape.token_bytes
        return self._forward(requests * width, kv_bytes / self.reading.verify)

    def prefill(self) -> float:
        """Of prompts that are in the cache but for a token or two."""
        return self.shape.layers * PREFILL_LAYER_S

    def loading(self, tokens: float) -> float:
        """The KV of so many tokens from the host."""
        return tokens * self.shape.token_bytes / self.card.link_rate

    def _forward(self, tokens: int, kv_bytes: float) -> float:
        weights = self.shape.weight_bytes
        # Two bytes and two operations a parameter and token.
        products = max(weights / self.card.memory_rate, weights * tokens / self.card.flops)
        return self.shape.layers * LAYER_S + products + kv_bytes / self.card.memory_rate
