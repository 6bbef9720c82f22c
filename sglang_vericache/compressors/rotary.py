"""Rotary position embedding, as much of it as scoring needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of one layer: a rotation of pairs of dimensions by position.

    The *canonical order* of a head's dimensions is ``[first of each pair | second of each pair |
    not rotated]``, whichever way the model lays them out, so that moments need not know.

    Attributes:
        table: ``[P, R]`` cosines, then sines of the R/2 pairs at each position. They may carry a
            common factor (YaRN's attention scaling).
        interleaved: pairs are neighbouring dimensions (GPT-J) instead of half a head apart (NeoX).
    """

    table: torch.Tensor
    interleaved: bool = False

    @property
    def pairs(self) -> int:
        """Rotated pairs of dimensions, R/2."""
        return self.table.shape[1] // 2

    def canonical(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` of the model's order -> canonical order."""
        if not self.interleaved:
            return x
        rotated, rest = x[..., : 2 * self.pairs], x[..., 2 * self.pairs :]
        return torch.cat([rotated[..., ::2], rotated[..., 1::2], rest], dim=-1)

    def undo(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """What ``[n, H, D]`` of the positions from ``start`` on was before the embedding.

        Exact up to rounding, a common factor in the table included.

        Returns:
            ``[n, H, D]`` float32 in canonical order.
        """
        rows = self.table[start : start + x.shape[0]].float()
        cos, sin = rows.chunk(2, dim=-1)
        scale = cos.square() + sin.square()
        return turn_back(self.canonical(x.float()), (cos / scale)[:, None], (sin / scale)[:, None])

    def average(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cosine and sine ``[R/2]`` over ``count`` positions from ``start`` on.

        Positions beyond the table are ones that the model never reaches, so they are left out.
        """
        start = min(start, self.table.shape[0] - 1)
        cos, sin = self.table[start : start + count].float().mean(dim=0).chunk(2)
        return cos, sin


def turn_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs of ``[..., D]`` in canonical order, times the transposed rotation.

    Args:
        cos, sin: ``[..., R/2]``, broadcast over the leading dimensions; what is beyond R is left.
    """
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)
