"""The verify pass on torch_native against plain causal attention in float64.

SGLang's own memory pool, attention layer and backend; only the batch is made up.
"""

from __future__ import annotations

from types import SimpleNamespace

import cpu_engine
import numpy as np
import pytest
import torch

cpu_engine.required()

from sglang.srt.layers.attention.torch_native_backend import (  # noqa: E402
    TorchNativeAttnBackend,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from sglang_vericache.cpu.torch_native_verify import HOOKS, forward_extend  # noqa: E402

DIM, SLOTS, LAYERS = 16, 200, 2
# float32 sums over 16 dimensions and up to 60 tokens, compared with float64.
TOLERANCE = 2e-6


class Batch:
    """A verify batch of ``len(lengths)`` requests, ``width`` tokens each, in layer 1."""

    def __init__(self, lengths: list[int], width: int, heads: int, group: int) -> None:
        self.lengths, self.width, self.heads, self.group = lengths, width, heads, group
        self.pool = MHATokenToKVPool(
            size=SLOTS,
            page_size=1,
            dtype=torch.float32,
            head_num=heads,
            head_dim=DIM,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.copy_(torch.randn(buffer.shape))
        batch = len(lengths)
        self.table = torch.zeros(batch + 2, max(lengths) + width + 3, dtype=torch.int32)
        self.rows = torch.randperm(batch + 2)[:batch]
        free = (torch.randperm(SLOTS) + 1).split(
            [n + width for n in lengths] + [SLOTS - sum(lengths) - batch * width]
        )
        for row, own in zip(self.rows.tolist(), free[:-1], strict=True):
            self.table[row, : len(own)] = own.to(torch.int32)
        self.written = torch.cat([own[-width:] for own in free[:-1]])
        self.backend = TorchNativeAttnBackend(
            SimpleNamespace(
                device="cpu",
                req_to_token_pool=SimpleNamespace(req_to_token=self.table),
                token_to_kv_pool=self.pool,
            )
        )
        self.layer = SimpleNamespace(
            layer_id=1,
            tp_q_head_num=heads * group,
            tp_k_head_num=heads,
            tp_v_head_num=heads,
            qk_head_dim=DIM,
            v_head_dim=DIM,
            scaling=0.3,
            k_scale=None,
            v_scale=None,
        )
        self.forward = SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            out_cache_loc=self.written,
            req_pool_indices=self.rows,
            seq_lens=torch.tensor(lengths),
            spec_info=SimpleNamespace(draft_token_num=width),
        )
        tokens = batch * width
        self.q = torch.randn(tokens, heads * group * DIM)
        self.k, self.v = torch.randn(2, tokens, heads, DIM)

    def run(self, **changes) -> np.ndarray:
        def original(*args, **kwargs):
            raise AssertionError("a verify batch reached the extend path")

        output = forward_extend(
            original, self.backend, self.q, self.k, self.v, self.layer, self.forward, **changes
        )
        assert output.shape == self.q.shape
        return output.double().numpy()

    def formula(self) -> np.ndarray:
        """What decoding the same tokens one by one gives: each sees all up to itself."""
        keys = self.pool.get_key_buffer(1).double().numpy()
        values = self.pool.get_value_buffer(1).double().numpy()
        query = self.q.double().numpy().reshape(len(self.lengths), self.width, -1, DIM)
        output = np.zeros(query.shape)
        for b, length in enumerate(self.lengths):
            for i in range(self.width):
                seen = self.table[self.rows[b], : length + i + 1].tolist()
                for head in range(self.heads * self.group):
                    logits = 0.3 * keys[seen, head // self.group] @ query[b, i, head]
                    weights = np.exp(logits - logits.max())
                    weights /= weights.sum()
                    output[b, i, head] = weights @ values[seen, head // self.group]
        return output.reshape(self.q.shape)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("lengths", "width"),
    [([7], 1), ([7], 5), ([0], 3), ([40, 1, 13], 4), ([20, 20], 9)],
    ids=["decode", "one", "nothing-before", "ragged", "even"],
)
def test_equals_causal_attention(lengths, width, group):
    """Catches a mask aligned with the first token instead of the last, lengths that include the
    tokens being verified, kv heads shared by the wrong query heads, and requests mixed up."""
    batch = Batch(lengths, width, heads=2, group=group)
    found = batch.run()
    np.testing.assert_allclose(found, batch.formula(), atol=TOLERANCE)


def test_the_exact_kv_is_written():
    """Catches keys and values of verified tokens that are missing from the main pool, or written
    over another layer's: the next steps read them as exact."""
    batch = Batch([9, 3], 4, heads=2, group=2)
    other = batch.pool.get_key_buffer(0).clone()
    batch.run()
    assert torch.equal(batch.pool.get_key_buffer(1)[batch.written], batch.k)
    assert torch.equal(batch.pool.get_value_buffer(1)[batch.written], batch.v)
    assert torch.equal(batch.pool.get_key_buffer(0), other)


def test_without_saving_nothing_is_written():
    """Catches a flag that is ignored: some models write their keys themselves."""
    batch = Batch([9, 3], 4, heads=2, group=2)
    before = batch.pool.get_key_buffer(1).clone()
    found = batch.run(save_kv_cache=False)
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
