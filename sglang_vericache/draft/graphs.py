"""Draft steps as CUDA graphs, one for each batch size that SGLang captures."""

from __future__ import annotations

import bisect
import logging
import time

import torch
from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

from sglang_vericache.draft.step import DraftStep

logger = logging.getLogger(__name__)

WARM_UPS = 2


class DraftGraphs:
    """Replays `DraftStep.advance`: k steps are k replays, with no host synchronisation.

    Args:
        sizes: batch sizes to capture, ascending; a batch is padded up to the next one.
    """

    def __init__(self, step: DraftStep, sizes: list[int]) -> None:
        self.step, self.sizes = step, sizes
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        """Capture all sizes, the largest first, so that the others fit into its memory."""
        started, before = time.perf_counter(), torch.cuda.mem_get_info()[0]
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with model_capture_mode():
            for size in reversed(self.sizes):
                self._graphs[size] = self._capture(size, pool, stream)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        logger.info(
            "Captured draft CUDA graphs: bs=%s, elapsed=%.2f s, mem usage=%.2f GB.",
            self.sizes,
            time.perf_counter() - started,
            (before - torch.cuda.mem_get_info()[0]) / (1 << 30),
        )

    def _capture(self, size: int, pool, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        # Targets are 0: nothing moves while warming up, and all writes go to padding.
        none = self.step.requests[:0]
        self.step.load(none, none, none, none, none, none, size)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.step.advance(size)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self.step.advance(size)
        return graph

    def size_for(self, count: int) -> int | None:
        """The captured size that ``count`` requests are padded to, or None for too many."""
        at = bisect.bisect_left(self.sizes, count)
        return self.sizes[at] if at < len(self.sizes) else None

    def replay(self, size: int) -> None:
        self._graphs[size].replay()
