"""The verify pass on torch_native against plain causal attention in float64.

SGLang's own memory pool, attention layer and backend; only the batch is made up.
"""

from __future__ import annotations

import cpu_engine
import numpy as np
import pytest
import torch

cpu_engine.required()

from sglang.srt.layers.attention.torch_native_backend import (  # noqa: E402
    TorchNativeAttnBackend,
)
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from verify_batch import NAMES, SIZES, TOLERANCE, Batch  # noqa: E402

from sglang_vericache.cpu.torch_native_verify import HOOKS, forward_extend  # noqa: E402


def run(batch: Batch, **changes) -> np.ndarray:
    def original(*args, **kwargs):
        raise AssertionError("a verify batch reached the extend path")

    output = forward_extend(
        original, batch.backend, batch.q, batch.k, batch.v, batch.layer, batch.forward, **changes
    )
    assert output.shape == batch.q.shape
    return output.double().numpy()


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("lengths", "width"), SIZES, ids=NAMES)
def test_equals_causal_attention(lengths, width, group):
    """Catches a mask aligned with the first token instead of the last, lengths that include the
    tokens being verified, kv heads shared by the wrong query heads, and requests mixed up."""
    batch = Batch(lengths, width, heads=2, group=group)
    found = run(batch)
    np.testing.assert_allclose(found, batch.formula(), atol=TOLERANCE)


def test_the_exact_kv_is_written():
    """Catches keys and values of verified tokens that are missing from the main pool, or written
    over another layer's: the next steps read them as exact."""
    batch = Batch([9, 3], 4, heads=2, group=2)
    other = batch.pool.get_key_buffer(0).clone()
    run(batch)
    assert torch.equal(batch.pool.get_key_buffer(1)[batch.written], batch.k)
    assert torch.equal(batch.pool.get_value_buffer(1)[batch.written], batch.v)
    assert torch.equal(batch.pool.get_key_buffer(0), other)


def test_without_saving_nothing_is_written():
    """Catches a flag that is ignored: some models write their keys themselves."""
    batch = Batch([9, 3], 4, heads=2, group=2)
    before = batch.pool.get_key_buffer(1).clone()
    found = run(batch, save_kv_cache=False)
    assert torch.equal(batch.pool.get_key_buffer(1), before)
    np.testing.assert_allclose(found, batch.formula(), atol=TOLERANCE)


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
