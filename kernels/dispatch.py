"""Which implementation of an operation serves a tensor."""

from __future__ import annotations

from functools import cache

import torch


def runs_triton(tensor: torch.Tensor) -> bool:
    """True on a GPU, and everywhere under Triton's interpreter (TRITON_INTERPRET=1).

    Tests that want one implementation import it from its file.
    """
    return tensor.is_cuda or _interpreted()


@cache
def _interpreted() -> bool:
    try:
        import triton
    except ImportError:  # torch for CPUs comes without
        return False
    return triton.knobs.runtime.interpret
