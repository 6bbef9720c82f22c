"""Drafting: some steps for some requests of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch

from sglang_vericache.draft.graphs import DraftGraphs
from sglang_vericache.draft.step import DraftStep
from sglang_vericache.upload import to_device


class Drafter:
    """Extends the drafted tokens of requests; what a step needs stays on the device.

    Args:
        graphs: captured steps; None runs them eagerly.
    """

    def __init__(self, step: DraftStep, graphs: DraftGraphs | None) -> None:
        self.step, self.graphs = step, graphs

    def run(
        self,
        batch: ScheduleBatch,
        work: Sequence[tuple[int, int]],
        drafted: Sequence[int],
        pending: torch.Tensor,
        committed: torch.Tensor,
        loaded: Callable[[], None] | None = None,
    ) -> None:
        """Draft ``count`` more tokens for each (index, count) of ``work``.

        Args:
            drafted: tokens that each request of ``work`` has drafted already.
            pending: ``[bs]`` the token of each request whose KV is not computed yet.
            committed: ``[bs]`` tokens of each whose KV is.
            loaded: called when all that the device still has to read of the arguments lies before
                the current stream's end.

        Precondition: the row of each request holds a slot for every token drafted here.
        """
        step = self.step
        plan = to_device(
            [(i, done, done + count) for (i, count), done in zip(work, drafted, strict=True)],
            committed.device,
        )
        size = self.graphs.size_for(len(work)) if self.graphs is not None else None
        step.load(plan, batch.req_pool_indices, pending, committed, size or len(work))
        if loaded is not None:
            loaded()
        for _ in range(max(count for _, count in work)):
            if size is not None:
                self.graphs.replay(size)
            else:
                step.advance(len(work))
