"""Every scorer against NVIDIA's kvpress, called at its score(): an implementation not ours.

`make setup` installs kvpress without its dependencies, whose pins exclude SGLang's. Importing it
patches the attention of transformers, which nothing else in this process uses.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from score_fakes import THETA, inputs_of, make_rotary, rotate

from sglang_vericache.compressors.registry import SCORERS
from sglang_vericache.compressors.scorers.expected_attention import ExpectedAttention
from sglang_vericache.compressors.scorers.keydiff import KeyDiff
from sglang_vericache.compressors.scorers.knorm import Knorm
from sglang_vericache.compressors.scorers.snapkv import SnapKV
from sglang_vericache.compressors.scorers.streamingllm import StreamingLLM
from sglang_vericache.compressors.select import select_rows

try:
    from kvpress import (
        ExpectedAttentionPress,
        KeyDiffPress,
        KnormPress,
        SnapKVPress,
        StreamingLLMPress,
    )
except ImportError as error:
    # `make test` has installed it and says so: there a missing oracle is a failure.
    if os.environ.get("VERICACHE_REQUIRE_KVPRESS"):
        raise
    reason = f"kvpress does not import ({error}); `make setup` installs it"
    pytest.skip(reason, allow_module_level=True)

# Both sides are float32 sums in another order; scores relative to their size. Norms and cosines
# are sums of D numbers, softmax weights carry the error of logits of size ten.
SUMS, WEIGHTS = 2e-6, 5e-5
SINKS = 4

SHAPES = pytest.mark.parametrize(
    ("tokens", "heads", "group", "dim"),
    [
        pytest.param(90, 1, 1, 16, id="one-head"),
        pytest.param(131, 3, 3, 64, id="gqa-3"),
        pytest.param(200, 2, 7, 128, id="gqa-7"),
    ],
)


@dataclass
class Case:
    """Random tensors of a path; ``before`` are the queries before rotary embedding."""

    keys: torch.Tensor
    values: torch.Tensor
    before: torch.Tensor

    @classmethod
    def make(cls, tokens: int, heads: int, group: int, dim: int) -> Case:
        positions = torch.arange(tokens)
        keys = torch.randn(tokens, heads, dim) + torch.randn(heads, dim)
        return cls(
            keys=rotate(keys, positions, make_rotary(dim, tokens)),
            values=torch.randn(tokens, heads, dim),
            before=torch.randn(tokens, heads * group, dim) + torch.randn(heads * group, dim),
        )

    @property
    def rotary(self):
        return make_rotary(self.keys.shape[2], len(self.keys) + 512)

    def ours(self, scorer) -> torch.Tensor:
        """``[H, T]``; statistics and windows seen in three chunks."""
        queries = rotate(self.before, torch.arange(len(self.keys)), self.rotary)
        chunks = [10, len(self.keys) - 20]
        inputs = inputs_of(scorer, self.keys, self.values, queries, self.rotary, chunks)
        return scorer.score(inputs)

    def theirs(self, press) -> torch.Tensor:
        """``[H, T]`` of a layer whose hidden states are the queries themselves."""
        tokens, heads, dim = self.keys.shape
        query_heads = self.before.shape[1]
        module = SimpleNamespace(
            config=SimpleNamespace(num_attention_heads=query_heads, num_key_value_heads=heads),
            head_dim=dim,
            layer_idx=0,
            q_proj=lambda hidden: hidden,
            rotary_emb=lambda x, positions: cos_sin(dim, positions),
        )
        batch = [x.transpose(0, 1)[None] for x in (self.keys, self.values)]
        positions = torch.arange(tokens)[None]
        scores = press.score(
            module,
            self.before.flatten(1)[None],
            *batch,
            None,
            {"position_embeddings": cos_sin(dim, positions)},
        )
        return scores[0]


def cos_sin(dim: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[1, n, D]`` cosines and sines as transformers' rotary modules give them."""
    frequency = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions[..., None].double() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().float(), angle.sin().float()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, relative: float) -> None:
    torch.testing.assert_close(
        ours, theirs, rtol=relative, atol=relative * float(theirs.abs().max())
    )


def test_every_scorer_has_an_oracle():
    """Catches a new scorer that nobody compares."""
    assert set(SCORERS.values()) == {SnapKV, ExpectedAttention, KeyDiff, Knorm, StreamingLLM}


@SHAPES
def test_knorm(tokens, heads, group, dim):
    case = Case.make(tokens, heads, group, dim)
    assert_close(case.ours(Knorm()), case.theirs(KnormPress()), SUMS)


@SHAPES
def test_keydiff(tokens, heads, group, dim):
    case = Case.make(tokens, heads, group, dim)
    assert_close(case.ours(KeyDiff()), case.theirs(KeyDiffPress()), SUMS)


@SHAPES
def test_streamingllm(tokens, heads, group, dim):
    """The scores are other numbers; the tokens kept are the same."""
    case = Case.make(tokens, heads, group, dim)
    for kept in (70, 80, tokens):
        theirs = case.theirs(StreamingLLMPress(compression_ratio=1 - kept / tokens))
        wanted = [head.nonzero().flatten().tolist() for head in theirs]
        assert len(wanted[0]) == kept
        assert select_rows(case.ours(StreamingLLM()), kept, 0, tokens).tolist() == wanted


@SHAPES
@pytest.mark.parametrize("window", [8, 64])
def test_snapkv(tokens, heads, group, dim, window):
    """Up to the window, which kvpress cuts off before smoothing: where the smoothing reaches
    across the cut, theirs lacks the window's own mass."""
    case = Case.make(tokens, heads, group, dim)
    scorer = SnapKV(window=window)
    end = tokens - window - scorer.kernel // 2
    theirs = case.theirs(SnapKVPress(window_size=window, kernel_size=scorer.kernel))
    assert_close(case.ours(scorer)[:, :end], theirs[:, :end], WEIGHTS)


@SHAPES
@pytest.mark.parametrize("future", [1, 512])
def test_expected_attention_without_covariance(tokens, heads, group, dim, future):
    """Any queries: the mean, its rotation, the softmax and the values."""
    case = Case.make(tokens, heads, group, dim)
    press = ExpectedAttentionPress(n_future_positions=future, use_covariance=False)
    ours = case.ours(ExpectedAttention(future=future))
    assert_close(ours[:, SINKS:], case.theirs(press)[:, SINKS:], WEIGHTS)


@SHAPES
@pytest.mark.parametrize("future", [1, 512])
def test_expected_attention(tokens, heads, group, dim, future):
    """Queries whose sample covariance is zero but within rotated pairs, where what we keep of it
    is all there is: then theirs, with all of it, must give the same."""
    case = Case.make(tokens, heads, group, dim)
    case.before[SINKS:] = paired_queries(tokens - SINKS, heads * group, dim)
    press = ExpectedAttentionPress(n_future_positions=future)
    ours = case.ours(ExpectedAttention(future=future, covariance=1))
    theirs = case.theirs(press)[:, SINKS:]
    assert_close(ours[:, SINKS:], theirs, WEIGHTS)
    without = case.theirs(ExpectedAttentionPress(n_future_positions=future, use_covariance=False))[
        :, SINKS:
    ]
    assert (without - theirs).abs().max() > 0.1 * theirs.max(), "the covariance matters here"


def paired_queries(count: int, heads: int, dim: int) -> torch.Tensor:
    """``[count, heads, dim]`` whose sample covariance between dimensions of different pairs is
    zero up to rounding, and arbitrary within each pair."""
    queries = []
    for _ in range(heads):
        draws = torch.randn(count, dim, dtype=torch.float64)
        # Orthonormal columns of mean zero: their sample covariance is a multiple of one.
        white, _ = torch.linalg.qr(draws - draws.mean(0))
        first, second = (white * count**0.5).chunk(2, dim=-1)
        a, b, c = torch.randn(3, dim // 2, dtype=torch.float64)
        mean = torch.randn(dim, dtype=torch.float64)
        queries.append(torch.cat([a * first, b * first + c * second], dim=-1) + mean)
    return torch.stack(queries, dim=1).float()
