"""Which prefills are decode steps, and what such a step waits for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_request import request
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_vericache.plain.cached_prompts import CachedPrompts
from sglang_vericache.support import is_token_by_token


def batch_of(**more: Any) -> SimpleNamespace:
    known = dict(
        reqs=[request()] * 2,
        forward_mode=ForwardMode.EXTEND,
        chunked_req=None,
        is_prefill_only=False,
        is_extend_in_batch=True,
        replace_embeds=None,
        extend_lens=[1, 1],
        prefix_lens=[7, 900],
        hicache_consumer_index=2,
        spec_info=object(),
        seq_lens=torch.tensor([8, 901]),
        input_ids=torch.tensor([3, 4]),
        out_cache_loc=torch.tensor([40, 41]),
    )
    return SimpleNamespace(**(known | more))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        pytest.param({}, True, id="all-cached"),
        pytest.param({"extend_lens": [1, 2]}, False, id="two-new-tokens"),
        pytest.param({"prefix_lens": [0, 900]}, False, id="prompt-of-one-token"),
        pytest.param({"chunked_req": object()}, False, id="a-piece-of-a-prompt"),
        pytest.param({"is_prefill_only": True}, False, id="no-token-wanted"),
        pytest.param({"replace_embeds": object()}, False, id="embeddings-of-its-own"),
        pytest.param({"forward_mode": ForwardMode.MIXED}, False, id="mixed"),
        pytest.param(
            {"reqs": [request(), request(return_logprob=True)]}, False, id="log-probabilities"
        ),
        pytest.param({"reqs": [request(lora_id="a")] * 2}, False, id="adapter"),
    ],
)
def test_which(more, expected):
    """Catches a decode step in place of a prefill that returns more than tokens, or whose KV is
    not all there."""
    batch = batch_of(**more)
    assert not any(is_token_by_token(req) for req in batch_of().reqs)
    assert CachedPrompts(SimpleNamespace(), deterministic=False).are_all(batch) is expected
    assert not CachedPrompts(SimpleNamespace(), deterministic=True).are_all(batch)


@pytest.mark.parametrize("from_host", [False, True])
def test_the_step(from_host):
    """Catches a graph that reads keys and values of layers which are still on their way, and a
    batch that SGLang takes for a decode step when its result comes."""
    calls: list[Any] = []
    counter = SimpleNamespace(num_layers=5, wait_until=lambda layer: calls.append(layer))

    def forward(step):
        calls.append(step)
        return "result"

    worker = SimpleNamespace(
        hicache_layer_transfer_counter=counter if from_host else None,
        set_hicache_consumer=lambda index: calls.append(("consumer", index)),
        forward_batch_generation=forward,
    )
    prompts, batch = CachedPrompts(worker, deterministic=False), batch_of()
    assert prompts.run(batch) == "result" and prompts.passes == 1
    *waits, step = calls
    assert waits == ([("consumer", 2), 4] if from_host else [("consumer", 2)])
    assert step.forward_mode.is_decode() and step.spec_info is None
    assert not step.is_extend_in_batch
    assert step.seq_lens.tolist() == [8, 901] and step.out_cache_loc.tolist() == [40, 41]
    assert batch.forward_mode.is_extend() and batch.is_extend_in_batch
