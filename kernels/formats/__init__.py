"""How a draft pool encodes a token: one file per format, found by the name of the flag."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_vericache.kernels.formats.base import PoolFormat
from sglang_vericache.kernels.formats.dense import DenseFormat
from sglang_vericache.kernels.formats.fp8 import Fp8Format
from sglang_vericache.kernels.formats.int4 import Int4Format

__all__ = ["FORMATS", "DenseFormat", "Fp8Format", "Int4Format", "PoolFormat", "create_format"]

# At which the kernels over four bits are tested.
TESTED_DIMS = (64, 80, 96, 128, 256)


def _automatic(model_dtype: torch.dtype, head_dim: int) -> PoolFormat:
    """Four bits instead of sixteen, as measured: a draft reads a quarter of the bytes in less than
    half the time (benchmarks/results/kernels.jsonl), and a round of the default compressor brings
    98 % of the tokens."""
    if model_dtype.itemsize == 2 and head_dim in TESTED_DIMS:
        return Int4Format()
    return DenseFormat(model_dtype)


# Each takes the dtype of the main pool and its head_dim, which only "auto" looks at.
FORMATS: dict[str, Callable[[torch.dtype, int], PoolFormat]] = {
    "auto": _automatic,
    "bfloat16": lambda *_: DenseFormat(torch.bfloat16),
    "float16": lambda *_: DenseFormat(torch.float16),
    "float32": lambda *_: DenseFormat(torch.float32),
    "fp8_e4m3": lambda *_: Fp8Format(),
    "int4": lambda *_: Int4Format(),
}


def create_format(name: str, model_dtype: torch.dtype, head_dim: int) -> PoolFormat:
    """The format called ``name``.

    Args:
        model_dtype, head_dim: of the main pool; "auto" is four bits for 16-bit numbers in heads of
            the usual sizes, and keeps others.

    Raises:
        ValueError: no such format; the message lists the names.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown draft pool format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name](model_dtype, head_dim)
