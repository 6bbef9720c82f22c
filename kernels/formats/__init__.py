"""How a draft pool encodes a token: one file per format, found by the name of the flag."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_vericache.kernels.formats.base import PoolFormat
from sglang_vericache.kernels.formats.dense import DenseFormat
from sglang_vericache.kernels.formats.fp8 import Fp8Format
from sglang_vericache.kernels.formats.int4 import Int4Format

__all__ = ["FORMATS", "DenseFormat", "Fp8Format", "Int4Format", "PoolFormat", "create_format"]

# Each takes the dtype of the main pool, which only "auto" looks at.
FORMATS: dict[str, Callable[[torch.dtype], PoolFormat]] = {
    "auto": DenseFormat,
    "bfloat16": lambda _: DenseFormat(torch.bfloat16),
    "float16": lambda _: DenseFormat(torch.float16),
    "float32": lambda _: DenseFormat(torch.float32),
    "fp8_e4m3": lambda _: Fp8Format(),
    "int4": lambda _: Int4Format(),
}


def create_format(name: str, model_dtype: torch.dtype) -> PoolFormat:
    """The format called ``name``.

    Args:
        model_dtype: dtype of the main pool; "auto" keeps it.

    Raises:
        ValueError: no such format; the message lists the names.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown draft pool format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name](model_dtype)
