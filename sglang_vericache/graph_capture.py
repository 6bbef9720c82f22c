"""Capturing CUDA graphs that share their memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner.eager_runner import EagerRunner
from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

logger = logging.getLogger(__name__)

WARM_UPS = 2
Result = TypeVar("Result")


class GraphCapture:
    """Captures graphs on a stream of its own, which is current inside of `open_capture`.

    The largest should come first, so that the others fit into its memory. What a graph returns is
    good until another one of the same capture is replayed.
    """

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """A graph of ``run``, and what ``run`` returned: tensors that each replay fills."""
        for _ in range(WARM_UPS):
            run()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self.stream):
            result = run()
        return graph, result


@contextmanager
def open_capture(what: str) -> Iterator[GraphCapture]:
    """Args:
    what: for the log, which is told how long it took and the memory that it took.
    """
    started, before = time.perf_counter(), torch.cuda.mem_get_info()[0]
    capture, current = GraphCapture(), torch.cuda.current_stream()
    capture.stream.wait_stream(current)
    with model_capture_mode(), torch.cuda.stream(capture.stream):
        yield capture
    current.wait_stream(capture.stream)
    torch.cuda.synchronize()
    logger.info(
        "Captured %s, elapsed=%.2f s, mem usage=%.2f GB.",
        what,
        time.perf_counter() - started,
        (before - torch.cuda.mem_get_info()[0]) / (1 << 30),
    )


def prefills_eagerly(model_runner: ModelRunner) -> bool:
    """No prefill is replayed, wholly or in parts."""
    runner = model_runner.prefill_cuda_graph_runner
    return runner is None or isinstance(runner, EagerRunner)
