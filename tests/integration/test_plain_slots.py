"""Which slots plain decoding writes to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput

from sglang_vericache.plain import decoder
from sglang_vericache.plain.decoder import decode_plainly

ROWS, WIDTH = 4, 16


@pytest.fixture
def written(monkeypatch) -> list[list[int]]:
    """Slots of each step of two of a batch's three requests; the second of the two has ended."""
    found = []

    class Worker:
        def forward_batch_generation(self, part):
            found.append(part.out_cache_loc.tolist())
            tokens = torch.zeros(2, dtype=torch.int64)
            return SimpleNamespace(
                next_token_ids=tokens, logits_output=LogitsProcessorOutput(next_token_logits=None)
            )

    monkeypatch.setattr(decoder, "select_sampling", lambda *_: None)
    request = SimpleNamespace(grammar=None, return_logprob=False)
    batch = SimpleNamespace(
        reqs=[request] * 3,
        req_pool_indices=torch.tensor([1, 2, 3]),
        seq_lens=torch.tensor([5, 6, 7]),
        seq_lens_cpu=torch.tensor([5, 6, 7]),
        orig_seq_lens=torch.tensor([5, 6, 7]),
        req_to_token_pool=SimpleNamespace(
            req_to_token=torch.arange(ROWS * WIDTH, dtype=torch.int32).view(ROWS, WIDTH)
        ),
        return_hidden_states=False,
        multimodal_inputs=None,
    )
    pending, index = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2])
    decode_plainly(Worker(), batch, index, (0, 2), pending, 3, ended=[1])
    return found


def test_a_request_that_has_ended_writes_to_padding(written):
    """Catches KV written into slots that were given back: under overlap scheduling with a grammar,
    a request whose end was seen after the batch was chosen runs once more, and a fetch of the same
    step may have been given them."""
    first = 1 * WIDTH + 5
    assert written == [[first, 0], [first + 1, 0], [first + 2, 0]]
