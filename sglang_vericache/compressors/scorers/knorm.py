"""Knorm: keep the keys of small norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_vericache.compressors.base import Granularity, Need, Scope, ScoreInputs, Scorer


@dataclass(frozen=True)
class Knorm(Scorer):
    """Minus the Euclidean norm of a key.

    The norm of a key and the attention it receives are inversely correlated over most layers.
    A score depends on its token alone, so the score of an interval holds for every path.
    Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, 2024.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "Knorm, arXiv 2406.11430"
    scope: ClassVar[Scope] = "node"
    needs: ClassVar[frozenset[Need]] = frozenset({"keys"})
    granularity: ClassVar[Granularity] = "head_even"
    any_basis: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return -inputs.keys.float().norm(dim=-1).mT
