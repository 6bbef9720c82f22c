"""Small integers from the host to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any], device: torch.device | str) -> torch.Tensor:
    """``values`` as an int64 tensor, without waiting for the device.

    `torch.tensor(..., device=)` copies from pageable memory, which holds up the host until the
    stream has done all that was launched before: here, a whole round of draft steps.
    """
    tensor = torch.tensor(values, dtype=torch.int64)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
