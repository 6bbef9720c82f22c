"""Draft steps as CUDA graphs, one for each batch size that SGLang captures."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import partial

import torch

from sglang_vericache.draft.step import DraftStep
from sglang_vericache.graph_capture import open_capture


def draft_sizes(captured: Sequence[int]) -> list[int]:
    """Of the batch sizes that SGLang captures for a speculative algorithm those that it captures
    without one: half of them, and padding costs a draft step next to nothing.

    Args:
        captured: at least one.
    """
    kept = {n for n in captured if n in (1, 2, 4, 12) or n % 8 == 0}
    return sorted(kept | {max(captured)})


class DraftGraphs:
    """Replays `DraftStep.advance`: k steps are k replays, with no host synchronisation.

    Args:
        sizes: batch sizes to capture, ascending; a batch is padded up to the next one.
    """

    def __init__(self, step: DraftStep, sizes: list[int]) -> None:
        self.step, self.sizes = step, sizes
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        # Targets are 0: nothing moves while warming up, and all writes go to padding.
        with open_capture(f"draft CUDA graphs: bs={self.sizes}") as capture:
            for size in reversed(self.sizes):
                self.step.load_padding(size)
                self._graphs[size], _ = capture(partial(self.step.advance, size))

    def size_for(self, count: int) -> int | None:
        """The captured size that ``count`` requests are padded to, or None for too many."""
        at = bisect.bisect_left(self.sizes, count)
        return self.sizes[at] if at < len(self.sizes) else None

    def replay(self, size: int) -> None:
        self._graphs[size].replay()
