"""SnapKV: keep what the last queries of the path attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import avg_pool1d

from sglang_vericache.compressors.base import (
    Granularity,
    Need,
    PathKeys,
    Scope,
    ScoreInputs,
    Scorer,
)
from sglang_vericache.compressors.window import QueryWindow, WindowWatch
from sglang_vericache.kernels.score_window import score_window


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Attention mass that the last ``window`` queries pay each token, smoothed over neighbours.

    Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, 2024.

    Attributes:
        window: queries observed, counted from the path's end.
        kernel: width of the smoothing over token positions; odd.
    """

    window: int = 64
    kernel: int = 5

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    scope: ClassVar[Scope] = "path"
    needs: ClassVar[frozenset[Need]] = frozenset({"keys", "queries"})
    granularity: ClassVar[Granularity] = "head_even"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd and positive")

    @property
    def watch(self) -> WindowWatch:
        return WindowWatch(self.window)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.queries is not None and inputs.query_positions is not None  # see `needs`
        keys, queries = inputs.keys.float(), inputs.queries.float()
        tokens, heads, dim = keys.shape
        observed = queries.shape[0]
        grouped = queries.view(observed, heads, -1, dim)  # [W, H, G, D]
        logits = torch.einsum("whgd,thd->hgwt", grouped, keys) * inputs.scaling
        key_positions = torch.arange(tokens, device=keys.device) + inputs.start
        future = key_positions[None, :] > inputs.query_positions[:, None]  # [W, T]
        mass = logits.masked_fill(future, float("-inf")).softmax(dim=-1).mean(dim=(1, 2))  # [H, T]
        return self._smooth(mass)

    def score_layers(self, path: PathKeys) -> torch.Tensor:
        window = path.observation
        assert isinstance(window, QueryWindow)  # what `watch` makes
        return self._smooth(
            score_window(
                window.queries,
                window.device_positions,
                path.buffers,
                path.slots,
                path.start,
                path.scaling,
            )
        )

    def _smooth(self, mass: torch.Tensor) -> torch.Tensor:
        return avg_pool1d(mass, self.kernel, stride=1, padding=self.kernel // 2)
