"""Which implementation of an operation serves a tensor."""

from __future__ import annotations

from functools import cache

import torch


def runs_triton(tensor: torch.Tensor) -> bool:
    """True on a GPU, and everywhere under Triton's interpreter (TRITON_INTERPRET=1).

    Tests that want one implementation import it from its file.
    """
    return tensor.is_cuda or _interpreted()


def overlaps_launches(tensor: torch.Tensor) -> bool:
    """Whether a kernel over ``tensor`` may be launched while the one before it still runs, and wait
    for that itself (programmatic dependent launch, Hopper and later)."""
    return tensor.is_cuda and not _interpreted() and _capability(tensor.device.index) >= 9


@cache
def _capability(device: int | None) -> int:
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


@cache
def _interpreted() -> bool:
    try:
        import triton
    except ImportError:  # torch for CPUs comes without
        return False
    return triton.knobs.runtime.interpret
