"""StreamingLLM: keep the first and the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_vericache.compressors.base import Granularity, Need, Scope, ScoreInputs, Scorer


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """A token's place: the later, the better; the sinks are kept by every selection.

    Reads nothing of the cache. What is recent changes with the path's end, hence path scope.
    Unlike in the paper, kept keys stay at their own positions: the verified model has not moved
    them either. Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2024.
    """

    name: ClassVar[str] = "streamingllm"
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    scope: ClassVar[Scope] = "path"
    needs: ClassVar[frozenset[Need]] = frozenset()
    granularity: ClassVar[Granularity] = "token"

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        *layers, tokens, heads, _ = inputs.keys.shape
        place = torch.arange(tokens, dtype=torch.float32, device=inputs.keys.device)
        return place.expand(*layers, heads, tokens)
