"""What every test gets: fixed seeds, and fresh memory that shows when it is read unwritten."""

from __future__ import annotations

import os
import random
import sys

import pytest
import torch

import sglang_vericache
from sglang_vericache import kernels

# The tensors of tests are too small to share out, and other jobs want the cores.
torch.set_num_threads(1)

SOURCES = tuple(
    os.path.realpath(folder) + os.sep
    for package in (sglang_vericache, kernels)
    for folder in package.__path__
)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch) -> None:
    """``torch.empty`` and its like, called from our code, give not-a-number (or the largest
    integer): an output that is never written fails instead of holding whatever was there."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if os.path.realpath(sys._getframe(1).f_code.co_filename).startswith(SOURCES):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return poisoned
