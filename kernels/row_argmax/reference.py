"""The greatest number of each row, by torch."""

from __future__ import annotations

import torch


def row_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Column of the greatest number of each row, the first of equals; NaN is greater than any.

    Args:
        logits: ``[N, V]``.

    Returns:
        ``[N]`` int64.
    """
    return logits.argmax(dim=-1)
