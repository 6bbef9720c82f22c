"""Device functions of split attention: which rows a program reads, and its running softmax.

Softmax is taken in base 2: scores are scaled by log2(e) once, and ``exp2`` is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_bounds(length, num_splits, split, BLOCK_N: tl.constexpr, LEAST_ROWS: tl.constexpr):
    """Rows [begin, end) of one split, and how many splits of this view have any.

    A view of length 0 has one split, an empty one, so that somebody writes its output.

    Args:
        LEAST_ROWS: of every split but the last: splits are counted on the host, which does not know
            how long a view is.
    """
    least = tl.maximum(tl.cdiv(length, num_splits), LEAST_ROWS)
    per_split = tl.cdiv(least, BLOCK_N) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    active = tl.maximum(tl.cdiv(length, tl.maximum(per_split, 1)), 1)
    return begin, end, active


@triton.jit
def to_base_2(scores, logit_cap, CAPPED: tl.constexpr):
    """Scaled scores under the soft cap, cap * tanh(scores / cap), in base 2."""
    if CAPPED:
        doubled = tl.clamp(2.0 * scores / logit_cap, -40.0, 40.0)  # where exp is finite
        scores = logit_cap * (2.0 * tl.sigmoid(doubled) - 1.0)
    return scores * LOG2_E


@triton.jit
def softmax_step(scores, unit, visible, running_max, running_sum):
    """Take a block of scores into the running softmax.

    Args:
        unit: what scores are multiplied by to be in base 2, above 0.

    Returns:
        weights of the block relative to the new maximum, the factor by which everything
        accumulated before shrinks, the new maximum and the new sum.
    """
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, axis=1) * unit)
    # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is no number.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * unit - shift[:, None])
    shrink = tl.exp2(running_max - shift)
    return weights, shrink, new_max, running_sum * shrink + tl.sum(weights, axis=1)
