"""Attention of verify passes, torch_native's and our kernel's, against plain causal attention in
float64.

SGLang's own memory pool, attention layer and backend; only the batch is made up.
"""

from __future__ import annotations

from collections.abc import Callable

import cpu_engine
import numpy as np
import pytest
import torch

cpu_engine.required()

from verify_batch import NAMES, SIZES, TOLERANCE, Batch, row_attention_for  # noqa: E402

from sglang_vericache.cpu.torch_native_verify import forward_extend  # noqa: E402


def by_torch_native(batch: Batch, *given, **changes) -> torch.Tensor:
    def original(*args, **kwargs):
        raise AssertionError("a verify batch reached the extend path")

    return forward_extend(original, batch.backend, *given, **changes)


def by_rows(batch: Batch, *given, **changes) -> torch.Tensor:
    attention = row_attention_for(batch)
    attention.init_forward_metadata(batch.forward)
    return attention.forward_extend(*given, **changes)


Way = Callable[..., torch.Tensor]
WAYS = pytest.mark.parametrize("way", [by_torch_native, by_rows], ids=["torch_native", "rows"])


def run(way: Way, batch: Batch, **changes) -> np.ndarray:
    output = way(batch, batch.q, batch.k, batch.v, batch.layer, batch.forward, **changes)
    assert output.shape == batch.q.shape
    return output.double().numpy()


@WAYS
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("lengths", "width"), SIZES, ids=NAMES)
def test_equals_causal_attention(way, lengths, width, group):
    """Catches a mask aligned with the first token instead of the last, lengths without the tokens
    being verified or with them twice, kv heads shared by the wrong query heads, another layer's
    keys, and requests mixed up."""
    batch = Batch(lengths, width, heads=2, group=group)
    found = run(way, batch)
    np.testing.assert_allclose(found, batch.formula(), atol=TOLERANCE)


@WAYS
def test_the_exact_kv_is_written(way):
    """Catches keys and values of verified tokens that are missing from the main pool, or written
    over another layer's: the next steps read them as exact."""
    batch = Batch([9, 3], 4, heads=2, group=2)
    other = batch.pool.get_key_buffer(0).clone()
    run(way, batch)
    assert torch.equal(batch.pool.get_key_buffer(1)[batch.written], batch.k)
    assert torch.equal(batch.pool.get_value_buffer(1)[batch.written], batch.v)
    assert torch.equal(batch.pool.get_key_buffer(0), other)


@WAYS
def test_without_saving_nothing_is_written(way):
    """Catches a flag that is ignored: some models write their keys themselves."""
    batch = Batch([9, 3], 4, heads=2, group=2)
    before = batch.pool.get_key_buffer(1).clone()
    found = run(way, batch, save_kv_cache=False)
    assert torch.equal(batch.pool.get_key_buffer(1), before)
    np.testing.assert_allclose(found, batch.formula(), atol=TOLERANCE)
