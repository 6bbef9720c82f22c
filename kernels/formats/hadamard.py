"""Hadamard rotation of head vectors: spreads outliers over the dimensions of a block."""

from __future__ import annotations

import torch


def rotation_block(head_dim: int) -> int:
    """Size of the rotated blocks: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


def rotate(vectors: torch.Tensor, block: int) -> torch.Tensor:
    """Each block of the last dimension times the normalised Hadamard matrix, in float32.

    The matrix is symmetric and its own inverse, so the same call rotates back.

    Args:
        vectors: ``[..., D]``, D a multiple of ``block``.
        block: a power of two.

    Note:
        Kernels repeat these butterflies in this order, so that codes agree to the bit.
    """
    rows = vectors.float().reshape(-1, block)
    half = 1
    while half < block:
        pairs = rows.view(-1, block // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack([first + second, first - second], dim=2).view(-1, block)
        half *= 2
    return (rows * block**-0.5).view(vectors.shape)
