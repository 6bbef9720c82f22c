"""score_window against softmax(q k) in float64, and the kernel against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pools import DEVICE, main_pool, needs_triton, relative_error

from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.score_window import reference, score_window

# Weights of at most 1, sums of up to 64 of them in float32.
FLOAT32_TOLERANCE = 2e-6
START = 100


def formula(queries, query_positions, key_buffers, slots, scaling) -> np.ndarray:
    layers, window, query_heads, _ = queries.shape
    heads = key_buffers[0].shape[1]
    group = query_heads // heads
    mass = np.zeros((layers, heads, len(slots)))
    for layer in range(layers):
        keys = key_buffers[layer][slots].double().cpu().numpy()
        for w, position in enumerate(query_positions.tolist()):
            seen = [t for t in range(len(slots)) if START + t <= position]
            for h in range(query_heads if seen else 0):
                query = queries[layer, w, h].double().cpu().numpy()
                logits = scaling * keys[seen, h // group] @ query
                weights = np.exp(logits - logits.max())
                mass[layer, h // group, seen] += weights / weights.sum()
    return mass / (window * group)


def make(layers, window, heads, group, dim, tokens, dtype=torch.float32) -> tuple:
    queries = torch.randn(layers, window, heads * group, dim, device=DEVICE).to(dtype)
    keys, _ = main_pool(layers, tokens + 9, heads, dim, dtype)
    slots, unused = torch.randperm(tokens + 9).to(DEVICE).split([tokens, 9])
    for buffer in keys:
        buffer[unused] = float("nan")
    # The window is the path's end.
    positions = torch.arange(START + tokens - window, START + tokens, device=DEVICE)
    return queries, positions, keys, slots, dim**-0.5


def run(queries, positions, keys, slots, scaling) -> torch.Tensor:
    return score_window(queries, positions, keys, slots, START, scaling)


SHAPES = [
    pytest.param((1, 1, 1, 1, 64, 1), id="one"),
    pytest.param((2, 5, 2, 3, 80, 70), id="two-layers"),
    pytest.param((1, 20, 1, 7, 64, 130), id="wide-group"),
    pytest.param((1, 33, 2, 1, 96, 40), id="no-group"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(shape):
    """Catches heads of another group, a mean over too few rows, a softmax over the wrong tokens,
    and positions that are off by the start of the interval."""
    case = make(*shape)
    found = run(*case)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.cpu().numpy(), formula(*case), atol=FLOAT32_TOLERANCE)


def test_queries_within_and_before_the_interval():
    """Catches a causal mask that is one off, and not-a-number from a query that sees nothing."""
    queries, _, keys, slots, scaling = make(1, 4, 2, 2, 64, 20)
    positions = torch.tensor([START - 1, START, START + 7, START + 50], device=DEVICE)
    found = run(queries, positions, keys, slots, scaling)
    wanted = formula(queries, positions, keys, slots, scaling)
    np.testing.assert_allclose(found.cpu().numpy(), wanted, atol=FLOAT32_TOLERANCE)
    # One of the four queries sees nothing.
    np.testing.assert_allclose(found.sum(-1).cpu().numpy(), 0.75, atol=1e-5)


def test_some_layers():
    """Catches slices of layers that read the first ones."""
    queries, positions, keys, slots, scaling = make(3, 4, 2, 2, 64, 20)
    whole = run(queries, positions, keys, slots, scaling)
    buffers = LayerBuffers(keys)
    for layer in range(3):
        one = slice(layer, layer + 1)
        found = run(queries[one], positions, buffers[one], slots, scaling)
        torch.testing.assert_close(found, whole[one], atol=FLOAT32_TOLERANCE, rtol=0)


def test_large_logits():
    """Catches sums of exponentials that overflow."""
    queries, positions, keys, slots, scaling = make(1, 4, 1, 2, 64, 300)
    case = (40 * queries, positions, keys, slots, scaling)
    found = run(*case)
    assert found.isfinite().all()
    # Logits of size 40 in float32: errors of 2^-24 of them, in the exponent.
    np.testing.assert_allclose(found.cpu().numpy(), formula(*case), atol=5e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("window", "heads", "group"), [(17, 2, 4), (40, 1, 8), (7, 2, 1)])
def test_kernel(dtype, splits, window, heads, group):
    """Catches tokens read twice or never where splits and blocks meet, rows of a second block that
    are left out, padding rows that weigh something, and 16-bit sums."""
    from sglang_vericache.kernels.score_window import triton

    case = make(2, window, heads, group, 64, 300, dtype)
    wanted = reference.score_window(*case[:4], START, case[4])
    found = triton.score_window(*case[:4], START, case[4], splits=splits)
    # The inputs are the same 16-bit numbers on both sides.
    assert relative_error(found, wanted) < 1e-5


@needs_triton
@pytest.mark.parametrize("shift", [-250, -100, 50])
def test_whole_blocks_and_masks(shift):
    """Catches blocks taken for whole of which a query of the window sees a part only."""
    from sglang_vericache.kernels.score_window import triton

    queries, positions, *rest = make(1, 20, 2, 4, 64, 300, torch.bfloat16)
    positions = positions + shift
    wanted = reference.score_window(queries, positions, *rest[:2], START, rest[2])
    found = triton.score_window(queries, positions, *rest[:2], START, rest[2], splits=2)
    assert relative_error(found, wanted) < 1e-5


@needs_triton
def test_shapes_must_fit():
    """Catches layers of queries without keys, and heads that do not divide."""
    from sglang_vericache.kernels.score_window.triton import score_window

    queries, positions, keys, slots, scaling = make(2, 4, 2, 2, 64, 20)
    with pytest.raises(ValueError, match="do not fit"):
        score_window(queries[:1], positions, keys, slots, START, scaling)
    with pytest.raises(ValueError, match="do not fit"):
        score_window(queries[:, :, :3], positions, keys, slots, START, scaling)
