"""Patches 0003 and 0007: logits by chunks, verify passes on torch_native."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import patched_sglang
import pytest
import torch

patched_sglang.required()

from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()

from sglang.srt.layers.attention import torch_native_backend  # noqa: E402
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import (  # noqa: E402
    CaptureHiddenMode,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import (  # noqa: E402
    ForwardContext,
    forward_context,
    get_logits_consumer,
)
from sglang.srt.runtime_context import SpawnRanks, publish  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402
from sglang.srt.speculative.eagle_utils import TreeMaskMode  # noqa: E402
from test_bad_input import DENSE  # noqa: E402
from verify_batch import TOLERANCE, Batch  # noqa: E402

from sglang_vericache.verify.logits_consumer import (  # noqa: E402
    ConsumingTokenPicker,
    create_picker,
)

VOCAB, HIDDEN, ROWS = 128, 16, 10


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> LogitsProcessor:
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(DENSE))
    flags = ["--device", "cpu", "--skip-tokenizer-init", "--log-level", "error"]
    publish(
        prepare_server_args(["--model-path", str(model), *flags]),
        role="scheduler",
        ranks=SpawnRanks(world_rank=0),
    )
    return LogitsProcessor(SimpleNamespace(vocab_size=VOCAB))


class Forward:
    """One call of the logits processor."""

    def __init__(self, processor: LogitsProcessor, mode: ForwardMode) -> None:
        self.processor = processor
        self.hidden = torch.randn(ROWS, HIDDEN)
        self.head = SimpleNamespace(weight=torch.randn(VOCAB, HIDDEN))
        # The shared buffer of a CUDA graph: chunks must leave it alone.
        self.buffer = torch.zeros(ROWS, VOCAB)
        self.metadata = LogitsMetadata(
            forward_mode=mode,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            next_token_logits_buffer=self.buffer,
        )

    def __call__(self):
        return self.processor(None, self.hidden, self.head, self.metadata)


class Recorder:
    def __init__(self, chunk_rows: int) -> None:
        self.chunk_rows, self.seen = chunk_rows, []

    def consume(self, logits: torch.Tensor) -> torch.Tensor:
        self.seen.append(logits.shape[0])
        return logits.argmax(dim=-1)


@pytest.mark.parametrize("mode", [ForwardMode.TARGET_VERIFY, ForwardMode.DECODE], ids=str)
@pytest.mark.parametrize(
    ("chunk_rows", "chunks"),
    [(4, [4, 4, 2]), (1, [1] * ROWS), (ROWS, [ROWS]), (999, [ROWS])],
    ids=["rest", "single rows", "exact", "one chunk"],
)
def test_chunks_give_the_same_tokens(processor, mode, chunk_rows, chunks):
    """Catches lost or doubled rows, and logits that exist all at once."""
    forward, recorder = Forward(processor, mode), Recorder(chunk_rows)
    plain = forward()
    assert plain.next_token_ids is None and plain.next_token_logits.shape == (ROWS, VOCAB)
    expected = plain.next_token_logits.argmax(dim=-1)
    forward.buffer.zero_()
    with forward_context(ForwardContext(attn_backend=None, logits_consumer=recorder)):
        output = forward()
    assert torch.equal(output.next_token_ids, expected)
    assert output.next_token_logits is None and recorder.seen == chunks
    assert torch.equal(output.hidden_states, forward.hidden)
    assert not forward.buffer.any()
    assert get_logits_consumer() is None


def test_input_logprobs_are_refused(processor):
    """Catches log-probabilities that are silently missing."""
    forward = Forward(processor, ForwardMode.EXTEND)
    forward.metadata.extend_return_logprob = True
    forward.metadata.extend_seq_lens_cpu = [ROWS]
    forward.metadata.extend_logprob_start_lens_cpu = [0]
    with (
        forward_context(ForwardContext(attn_backend=None, logits_consumer=Recorder(4))),
        pytest.raises(AssertionError, match="input logprobs need the logits"),
    ):
        forward()


@pytest.mark.parametrize("nested", [True, False], ids=["in a draft forward", "outside"])
def test_the_plugins_picker(processor, nested):
    """Catches a picker that forgets chunks, keeps the last forward's tokens, or replaces the
    attention backend of the forward that it is in."""
    forward = Forward(processor, ForwardMode.TARGET_VERIFY)
    expected = forward().next_token_logits.argmax(dim=-1)
    picker = create_picker(3, SimpleNamespace(attn_backend="target"))
    assert isinstance(picker, ConsumingTokenPicker)
    outer = ForwardContext(attn_backend="draft")

    def pick():
        with picker.active() as picked:
            backend = torch_native_backend_of_context()
            forward()
        return picked.tokens, backend

    for _ in range(2):
        if nested:
            with forward_context(outer):
                tokens, backend = pick()
        else:
            tokens, backend = pick()
        assert torch.equal(tokens, expected)
        assert backend == ("draft" if nested else "target")


def torch_native_backend_of_context():
    from sglang.srt.model_executor.forward_context import get_attn_backend

    return get_attn_backend()


class NativeBatch(Batch):
    """The same batch through SGLang's own backend."""

    def __init__(self, *args, window: int | None = None, mask=None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.forward.spec_info.custom_mask = mask
        self.layer.is_cross_attention = False
        self.layer.sliding_window_size = window

    def run(self, **changes) -> np.ndarray:
        output = self.backend.forward_extend(
            self.q, self.k, self.v, self.layer, self.forward, **changes
        )
        assert output.shape == self.q.shape
        return output.double().numpy()

    def expected(self, sees) -> np.ndarray:
        """Attention of query i of a request over the positions for which ``sees(i, length)``."""
        keys = self.pool.get_key_buffer(1).double().numpy()
        values = self.pool.get_value_buffer(1).double().numpy()
        query = self.q.double().numpy().reshape(len(self.lengths), self.width, -1, keys.shape[-1])
        output = np.zeros(query.shape)
        for b, length in enumerate(self.lengths):
            for i in range(self.width):
                seen = self.table[self.rows[b]][sees(b, i, length)].tolist()
                for head in range(query.shape[2]):
                    logits = 0.3 * keys[seen, head // self.group] @ query[b, i, head]
                    weights = np.exp(logits - logits.max())
                    output[b, i, head] = weights / weights.sum() @ values[seen, head // self.group]
        return output.reshape(self.q.shape)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("lengths", "width"),
    [([7], 1), ([7], 5), ([0], 3), ([40, 1, 13], 4)],
    ids=["decode", "one", "nothing-before", "ragged"],
)
def test_a_chain_is_causal(lengths, width, group):
    batch = NativeBatch(lengths, width, heads=2, group=group)
    np.testing.assert_allclose(batch.run(), batch.formula(), atol=TOLERANCE)
    assert torch.equal(batch.pool.get_key_buffer(1)[batch.written], batch.k)


def test_a_sliding_window():
    batch = NativeBatch([9, 2], 3, heads=2, group=2, window=4)

    def sees(b, i, length):
        return list(range(max(0, length + i - 4), length + i + 1))

    np.testing.assert_allclose(batch.run(), batch.expected(sees), atol=TOLERANCE)


TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("mode", [TreeMaskMode.QLEN_ONLY, TreeMaskMode.FULL_MASK], ids=str)
def test_a_token_tree(monkeypatch, mode):
    """Catches siblings that see each other, in both layouts of the mask."""
    monkeypatch.setattr(torch_native_backend, "default_tree_mask_mode", lambda: mode)
    lengths = [11, 0, 4]
    if mode == TreeMaskMode.FULL_MASK:
        prefixes = [torch.ones(4, length, dtype=torch.bool) for length in lengths]
        mask = torch.cat([torch.cat([p, TREE], dim=1).flatten() for p in prefixes])
    else:
        mask = torch.cat([TREE.flatten()] * len(lengths))
    batch = NativeBatch(lengths, 4, heads=2, group=2, mask=mask)

    def sees(b, i, length):
        return [*range(length), *(length + j for j in range(4) if TREE[i, j])]

    np.testing.assert_allclose(batch.run(), batch.expected(sees), atol=TOLERANCE)
    batch.layer.sliding_window_size = 4
    with pytest.raises(NotImplementedError, match="token tree with sliding window"):
        batch.run()
