"""The stand-in for SGLang's kernel library: its two functions against loops, and what it says of
all the others. Needs torch only."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from sglang_vericache.cpu.engine import KERNEL_LIBRARY, environment

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the stand-in refuses machines with a GPU"
)


@pytest.fixture
def library(monkeypatch):
    """The stand-in under its own name, gone again afterwards."""
    if "sgl_kernel" in sys.modules:  # a process of the CPU engine
        yield sys.modules["sgl_kernel"]
        return
    monkeypatch.syspath_prepend(KERNEL_LIBRARY)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield importlib.import_module("sgl_kernel")
    for name in [name for name in sys.modules if name.split(".")[0] == "sgl_kernel"]:
        del sys.modules[name]


def test_it_is_the_stand_in(library):
    """Catches the published library found first, which loads libcuda when it is imported."""
    assert library.__file__.startswith(str(KERNEL_LIBRARY))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("rows", "starts", "ends"),
    [
        pytest.param([2], [0], [3], id="one"),
        pytest.param([4, 1, 3], [5, 0, 7], [6, 4, 9], id="ragged"),
        pytest.param([1, 2, 3], [2, 2, 2], [5, 2, 4], id="nothing-for-one"),
        pytest.param([], [], [], id="empty-batch"),
    ],
)
def test_assign_req_to_token_pool(library, rows, starts, ends, dtype):
    """Catches slots of one request written into another's row, or counted from the wrong start."""
    table = torch.full((6, 10), -1, dtype=torch.int32)
    wanted = table.tolist()
    slots = [100 + i for i in range(sum(ends) - sum(starts))]
    left = list(slots)
    for row, start, end in zip(rows, starts, ends, strict=True):
        for position in range(start, end):
            wanted[row][position] = left.pop(0)
    library.assign_req_to_token_pool_cpu(
        torch.tensor(rows, dtype=torch.int64),
        table,
        torch.tensor(starts, dtype=dtype),
        torch.tensor(ends, dtype=dtype),
        torch.tensor(slots, dtype=torch.int64),
        table.shape[1],
    )
    assert table.tolist() == wanted


@pytest.mark.parametrize(
    ("targets", "sources"),
    [
        pytest.param([3], [5], id="one"),
        pytest.param([0, 1, 2], [7, 5, 6], id="apart"),
        pytest.param([1, 2, 3], [0, 1, 2], id="chain"),
        pytest.param([4, 5], [5, 4], id="exchange"),
        pytest.param([2, 3], [2, 6], id="onto-itself"),
        pytest.param([], [], id="none"),
    ],
)
def test_copy_all_layer_kv_cache(library, targets, sources):
    """Catches a row that is read after it was overwritten, a stride taken for elements instead of
    bytes, and buffers that are left out. Layers may differ in row size and dtype."""
    buffers = [
        torch.randn(8, 2, 3),
        torch.randn(8, 4, 5).to(torch.bfloat16),
        torch.randn(8, 1, 2, dtype=torch.float64),
    ]
    wanted = [buffer.clone() for buffer in buffers]
    for new, old in zip(wanted, buffers, strict=True):
        for target, source in zip(targets, sources, strict=True):
            new[target] = old[source]
    library.copy_all_layer_kv_cache_cpu(
        torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64),
        torch.tensor([buffer[0].numel() * buffer.element_size() for buffer in buffers]),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor(sources, dtype=torch.int64),
    )
    for found, expected in zip(buffers, wanted, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name",
    ["sgl_kernel.rmsnorm", "sgl_kernel.moe.grouped_topk", "sgl_kernel.flash_attn.varlen"],
)
def test_a_missing_kernel_says_its_name(library, name):
    """Catches a None or an AttributeError far from its cause: importing is fine, calling tells
    what is missing and what would work."""
    module, _, function = name.rpartition(".")
    kernel = getattr(importlib.import_module(module), function)
    with pytest.raises(NotImplementedError) as error:
        kernel(torch.zeros(1), eps=1e-6)
    assert str(error.value).startswith(f"{name} needs SGLang's compiled kernel library")
    assert "--attention-backend torch_native" in str(error.value)


def test_an_operator_of_a_missing_kernel_says_its_name(library):
    """Catches `library.namespace.function.default(...)`, the way torch operators are called."""
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.ops\.silu\.default needs"):
        library.ops.silu.default(1)


def test_special_attributes_are_not_invented(library):
    """Catches a stand-in that answers `__wrapped__` or `__path__`-like questions of inspect and
    pickle with a kernel."""
    assert not hasattr(library, "__wrapped__")
    assert not hasattr(library.rmsnorm, "__wrapped__")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({}, f"{KERNEL_LIBRARY}", id="unset"),
        pytest.param({"PYTHONPATH": "/a:/b"}, f"{KERNEL_LIBRARY}:/a:/b", id="kept"),
        pytest.param({"PYTHONPATH": "/a::"}, f"{KERNEL_LIBRARY}:/a", id="empty-parts"),
        pytest.param({"PYTHONPATH": f"/a:{KERNEL_LIBRARY}"}, f"{KERNEL_LIBRARY}:/a", id="once"),
    ],
)
def test_environment(before, after):
    """Catches a user's own PYTHONPATH lost, or one that grows with every restart."""
    found = environment(before | {"HOME": "/h"})
    assert found == {"HOME": "/h", "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": after}
