"""row_argmax against Python's max."""

from __future__ import annotations

import math

import pytest
import torch
from pools import DEVICE

from sglang_vericache.kernels.row_argmax import row_argmax

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
WIDTHS = (1, 2, 127, 4095, 4096, 4097, 50_001)


def picked(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> list[int]:
    return row_argmax(torch.tensor(rows, dtype=dtype, device=DEVICE)).tolist()


@DTYPES
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_first_of_the_greatest(rows, width, dtype):
    """Catches columns left out, parts mixed up, and equals of which not the first is taken: of the
    few hundred whole numbers here most stand in several columns."""
    logits = torch.randint(-200, 200, (rows, width), device=DEVICE).to(dtype)
    wanted = [row.index(max(row)) for row in logits.tolist()]
    tokens = row_argmax(logits)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == wanted


@DTYPES
def test_numbers_close_together(dtype):
    """Catches an order of the bits that is not that of the numbers: neighbours in the dtype, of
    both signs and across the smallest ones."""
    about = torch.finfo(dtype)
    for number in (1.0, -1.0, about.tiny, -about.tiny, about.smallest_normal / 4, about.max / 2):
        low = torch.tensor(number, dtype=dtype)
        high = torch.nextafter(low, torch.tensor(about.max, dtype=dtype))
        assert low < high
        assert picked([[float(low), float(high), float(low)]], dtype) == [1]
        assert picked([[float(high), float(low)]], dtype) == [0]


def test_what_is_no_ordinary_number():
    """Catches zeros of which one is greater, infinities out of order, and a token beyond the
    vocabulary where every comparison is false."""
    infinite, nan = math.inf, math.nan
    rows = [
        [-0.0, 0.0, -1.0],
        [0.0, -0.0, -1.0],
        [-infinite, -3e38, -infinite],
        [3e38, infinite, infinite],
        [-infinite, -infinite, -infinite],
        [infinite, nan, nan],
        [nan, nan, nan],
    ]
    assert picked(rows) == [0, 0, 1, 1, 0, 1, 0]
    assert picked(rows) == torch.tensor(rows).argmax(dim=-1).tolist()


def test_slices_of_wider_rows():
    """Catches columns of padding that are taken for tokens: a head is often wider than the
    vocabulary."""
    wide = torch.randn(5, 70, device=DEVICE)
    wide[:, 60:] = 100.0
    narrow = wide[:, :60]
    assert row_argmax(narrow).tolist() == [row.index(max(row)) for row in narrow.tolist()]


def test_no_rows():
    assert row_argmax(torch.zeros(0, 9, device=DEVICE)).shape == (0,)
