"""Tokens picked from SGLang's logits processor are those of its own logits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cpu_engine
import pytest
import torch

cpu_engine.required()

from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402
from test_bad_input import DENSE  # noqa: E402

from sglang_vericache.hooks.logits_processor import pick_tokens  # noqa: E402
from sglang_vericache.verify.token_picker import TokenPicker  # noqa: E402

VOCAB, PADDED, HIDDEN, ROWS = 100, 128, 16, 10


@pytest.fixture(scope="module", autouse=True)
def published(tmp_path_factory) -> None:
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(DENSE))
    flags = ["--device", "cpu", "--skip-tokenizer-init", "--log-level", "error"]
    publish(
        prepare_server_args(["--model-path", str(model), *flags]),
        role="scheduler",
        ranks=SpawnRanks(world_rank=0),
    )


def processor_of(cap: float | None = None, scale: float | None = None) -> LogitsProcessor:
    config = SimpleNamespace(vocab_size=VOCAB, final_logit_softcapping=cap)
    return LogitsProcessor(config, logit_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_rows", [3, ROWS])
@pytest.mark.parametrize(
    "settings",
    [{}, {"scale": 0.25}, {"scale": -1.0}, {"cap": 5.0}],
    ids=["product alone", "scaled", "turned round", "capped"],
)
def test_the_tokens_of_its_own_logits(settings, chunk_rows, dtype):
    """Catches columns of a padded head that are taken for tokens, and what is done to logits after
    the product, such as a scale that turns their order round, left out."""
    processor = processor_of(**settings)
    hidden = torch.randn(ROWS, HIDDEN, dtype=dtype)
    head = SimpleNamespace(weight=torch.randn(PADDED, HIDDEN, dtype=dtype))
    head.weight[VOCAB:] *= 100
    metadata = LogitsMetadata(forward_mode=ForwardMode.DECODE)
    logits = processor._get_logits(hidden, head, metadata)
    assert logits.dtype == torch.float32 and logits.shape == (ROWS, VOCAB)
    picker = TokenPicker(chunk_rows)
    with picker.active():
        output = pick_tokens(None, processor, None, hidden, head, metadata)
    assert output.next_token_logits is None
    assert picker.tokens.tolist() == logits.argmax(dim=-1).tolist()
