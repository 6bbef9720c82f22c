"""The greatest number of each row of logits."""

from __future__ import annotations

import torch

from sglang_vericache.kernels.dispatch import runs_triton
from sglang_vericache.kernels.row_argmax import reference

__all__ = ["row_argmax"]


def row_argmax(logits: torch.Tensor) -> torch.Tensor:
    """See `reference.row_argmax`."""
    if not runs_triton(logits):
        return reference.row_argmax(logits)
    from sglang_vericache.kernels.row_argmax import triton

    return triton.row_argmax(logits)
