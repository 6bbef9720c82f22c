"""KeyDiff: keep the keys that differ most from the average key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from sglang_vericache.compressors.base import Granularity, Need, Scope, ScoreInputs, Scorer


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Minus the cosine between a key and the mean of the interval's unit keys.

    Keys that point away from the crowd are the ones that some query attends to sharply; the
    crowd is interchangeable. Needs no queries, so the score of an interval holds for every path
    through it. Park et al., KeyDiff, 2025.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "KeyDiff, arXiv 2504.15364"
    scope: ClassVar[Scope] = "node"
    needs: ClassVar[frozenset[Need]] = frozenset({"keys"})
    granularity: ClassVar[Granularity] = "head_even"
    any_basis: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        unit = normalize(inputs.keys.float(), dim=-1)  # [..., T, H, D]
        anchor = normalize(unit.mean(dim=-3), dim=-1)  # [..., H, D]
        return -torch.einsum("...thd,...hd->...ht", unit, anchor)
