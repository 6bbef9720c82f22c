"""The fixture of conftest.py itself: were it idle, unwritten outputs would pass by luck."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_vericache import config
from sglang_vericache.kernels import pool_format

PACKAGE_FILE = str(Path(config.__file__).with_name("made_up.py"))
KERNEL_FILE = str(Path(pool_format.__file__).parent / "made_up_op" / "reference.py")


def call_from(file: str, expression: str) -> torch.Tensor:
    """Evaluate ``expression`` as if it stood in ``file``."""
    return eval(compile(expression, file, "eval"), {"torch": torch, "like": torch.zeros(3)})


@pytest.mark.parametrize("file", [PACKAGE_FILE, KERNEL_FILE], ids=["package", "kernels"])
@pytest.mark.parametrize(
    "expression", ["torch.empty(3)", "torch.empty_like(like)", "like.new_empty(3)"]
)
def test_our_code_gets_not_a_number(file, expression):
    """Catches a poison that no longer matches where the package and its kernels lie."""
    assert call_from(file, expression).isnan().all()


def test_integers_are_no_slots():
    """Catches unwritten slot tensors that happen to be zero, a valid padding slot."""
    assert (call_from(PACKAGE_FILE, "torch.empty(3, dtype=torch.int32)") == 2**31 - 1).all()


def test_other_code_is_left_alone():
    """Catches a poison that slows or breaks libraries, which may rely on empty tensors."""
    like = call_from("/somewhere/else.py", "torch.empty_like(like)")
    assert like.shape == (3,)
    assert not call_from("/somewhere/else.py", "torch.zeros(3).new_empty(0)").numel()
