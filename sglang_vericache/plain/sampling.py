"""Sampling state of some requests of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


class _NoPenalizers:
    """Stands in while SGLang filters a forward-only copy, which has no orchestrator any more."""

    def filter(self, keep_indices: torch.Tensor) -> None:
        pass


def select_sampling(
    batch: ScheduleBatch, indices: Sequence[int], index: torch.Tensor
) -> SamplingBatchInfo:
    """The rows ``indices`` of a batch's forward-only sampling info, the original untouched.

    Penalties are accumulated already (SamplingBatchInfo.copy_for_forward).
    """
    info = batch.sampling_info
    part = replace(info, penalizer_orchestrator=_NoPenalizers())
    part.filter_batch(list(indices), index)
    part.penalizer_orchestrator = None
    for name in ("acc_additive_penalties", "acc_scaling_penalties"):
        penalties = getattr(info, name)
        setattr(part, name, penalties[index] if penalties is not None else None)
    greedy = [batch.reqs[i].sampling_params.top_k <= 1 for i in indices]
    part.is_all_greedy, part.is_any_greedy = all(greedy), any(greedy)
    return part
