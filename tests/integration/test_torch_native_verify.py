"""Which forwards of torch_native the verify pass takes over."""

from __future__ import annotations

import cpu_engine
import pytest

cpu_engine.required()

from sglang.srt.layers.attention.torch_native_backend import (  # noqa: E402
    TorchNativeAttnBackend,
)
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from verify_batch import Batch  # noqa: E402

from sglang_vericache.cpu.torch_native_verify import HOOKS, forward_extend  # noqa: E402


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.MIXED], ids=str)
def test_other_modes_are_sglangs_own(mode):
    """Catches a prefill that goes through the verify path, or loses an argument on its way."""
    batch = Batch([9], 4, heads=2, group=2)
    batch.forward.forward_mode = mode
    given = (batch.backend, batch.q, batch.k, batch.v, batch.layer, batch.forward, False)

    def original(*args, **kwargs):
        assert len(args) == len(given) and all(a is b for a, b in zip(args, given, strict=True))
        return "the original's"

    assert forward_extend(original, *given) == "the original's"


def test_the_hook_names_what_it_wraps():
    """Catches a target that SGLang has renamed: the hook would silently not apply."""
    (hook,) = HOOKS
    module, _, path = hook.target.partition(".TorchNativeAttnBackend")
    assert module == TorchNativeAttnBackend.__module__ and path == ".forward_extend"
    assert callable(TorchNativeAttnBackend.forward_extend)
    assert hook.function is forward_extend and hook.cpu_only
