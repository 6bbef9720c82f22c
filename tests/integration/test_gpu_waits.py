"""That the host does not wait for the device where a step's outcome is put together.

Run by hand on a GPU: ``python -P -m pytest tests/integration -m gpu``.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

REQUESTS, WIDTH = 8, 17


@pytest.fixture
def strict():
    """Any operation that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_an_emission_waits_for_nothing(strict):
    """Catches numbers assigned through index tensors, which torch copies from pageable memory
    and waits for the stream: plain decoding took three times as long."""
    from sglang_vericache.emission import Emission
    from sglang_vericache.plain.decoder import PlainTokens
    from sglang_vericache.upload import to_device
    from sglang_vericache.verify.verifier import Verified

    device = torch.device("cuda")
    batch = SimpleNamespace(reqs=[None] * REQUESTS, seq_lens=torch.arange(REQUESTS, device=device))
    pending = torch.zeros(REQUESTS, dtype=torch.int64, device=device)
    published = []
    emission = Emission(batch, pending, WIDTH, published.append)
    plain, verified = to_device([0, 2], device), to_device([1, 3], device)
    tokens = torch.ones((2, 4), dtype=torch.int64, device=device)
    emission.add_verified(verified, Verified(tokens, tokens.sum(1), tokens))
    emission.publish(plain, 4)
    emission.add_plain(plain, [0, 2], PlainTokens(tokens, tokens, None))
    result = emission.result()
    torch.cuda.set_sync_debug_mode("default")
    assert result.accept_lens.tolist() == [4, 4, 4, 4, 0, 0, 0, 0]
    assert published[0].tolist() == [4, 5, 6, 7, 4, 5, 6, 7]


def test_a_fetch_does_not_wait_for_drafts():
    """Catches a link that idles while the device drafts behind a step's last read: the loader waits
    for the event before them, and so does the scheduler's stream, on which slots are handed out."""
    from sglang_vericache.loader.client import LoaderClient
    from sglang_vericache.loader.copy import StreamCopier

    shape, layers = (4096, 2, 64), 4
    host = [torch.randn(shape).pin_memory() for _ in range(layers)]
    device = [torch.zeros(shape, device="cuda") for _ in range(layers)]
    client = LoaderClient(StreamCopier(host, device), StreamCopier(host, device))
    forward, schedule = torch.cuda.Stream(), torch.cuda.Stream()
    rows = torch.arange(1000, 2000)
    torch.cuda.synchronize()
    with torch.cuda.stream(forward):
        device[0][rows] + 1  # a read of what is overwritten
        reads = torch.cuda.Event()
        reads.record()
        torch.cuda._sleep(2_000_000_000)  # about a second
        drafted = torch.cuda.Event()
        drafted.record()
    schedule.wait_event(reads)  # as SGLang does with what the worker publishes
    with torch.cuda.stream(schedule):
        slots = rows.to("cuda", non_blocking=True)
        named = torch.cuda.Event()
        named.record()
    job = client.fetch(rows, slots, (reads, named))
    client.finish(job)
    assert not drafted.query(), "the copy has waited for the drafts"
    drafted.synchronize()
    client.close()
    for source, target in zip(host, device, strict=True):
        assert torch.equal(target[rows].cpu(), source[rows])
