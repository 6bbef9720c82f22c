"""Merging in torch."""

from __future__ import annotations

import torch


def merge_states(
    output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Merge attention over another part of the context into ``output``, in place.

    The states of FlashInfer (arXiv 2501.01005, section 2.2): weights are to the base 2, and a part
    without tokens has -inf.

    Args:
        output, other: ``[N, H, D]`` attention over each part.
        lse, other_lse: ``[N, H]`` float32 logarithms, to the base 2, of the sums of weights.
    """
    most = torch.maximum(lse, other_lse)
    most = torch.where(most == -torch.inf, torch.zeros_like(most), most)
    weight, other_weight = torch.exp2(lse - most), torch.exp2(other_lse - most)
    total = (weight + other_weight).clamp(min=torch.finfo(torch.float32).tiny)
    merged = output.float() * weight[..., None] + other.float() * other_weight[..., None]
    output.copy_(merged / total[..., None])
