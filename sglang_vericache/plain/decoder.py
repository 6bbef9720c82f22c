"""Plain decoding of some requests: SGLang's own forward and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_vericache.plain.sampling import select_sampling
from sglang_vericache.sub_batch import sub_batch
from sglang_vericache.upload import to_device


@dataclass(frozen=True)
class PlainTokens:
    """Tokens of each of n requests, from m steps.

    Attributes:
        tokens: ``[n, m]`` int64.
        source_slots: ``[n, m]`` int64 main slots of the tokens that were read; their KV is there
            now.
        output: logits and log-probabilities of the last step, rows in the order of the requests.
    """

    tokens: torch.Tensor
    source_slots: torch.Tensor
    output: LogitsProcessorOutput


def decode_plainly(
    worker: TpModelWorker,
    batch: ScheduleBatch,
    index: torch.Tensor,
    indices: Sequence[int],
    pending: torch.Tensor,
    steps: int = 1,
    ended: Sequence[int] = (),
) -> PlainTokens:
    """Decode requests ``indices`` by ``steps`` tokens, exactly as SGLang does without speculation.

    Args:
        index: ``indices`` as an int64 tensor on the device.
        pending: ``[bs]`` the token of each request whose KV is not computed yet.
        ended: places in ``indices`` of requests that have given their slots back. What they yield
            is for nobody, and their KV goes to padding: a fetch that was ordered in this step may
            have been given those slots.

    Precondition: with more than one step, nothing that a request asks for needs its last token on
    the host.
    """
    requests, committed = batch.req_pool_indices[index], batch.seq_lens[index]
    positions = committed[:, None] + torch.arange(steps, device=committed.device)
    table = batch.req_to_token_pool.req_to_token
    source_slots = table[requests[:, None], positions].to(torch.int64)
    if ended:
        source_slots.index_fill_(0, to_device(ended, source_slots.device), 0)
    part = sub_batch(
        batch, indices, index, ForwardMode.DECODE, committed, pending[index], source_slots[:, 0]
    )
    part.seq_lens_cpu = batch.seq_lens_cpu[list(indices)]
    _take_request_options(part, batch, indices)
    part.sampling_info = select_sampling(batch, indices, index)
    tokens: list[torch.Tensor] = []
    for step in range(steps):
        part.seq_lens, part.seq_lens_cpu = part.seq_lens + 1, part.seq_lens_cpu + 1
        part.orig_seq_lens, part.seq_lens_sum = part.orig_seq_lens + 1, None
        part.out_cache_loc = source_slots[:, step].contiguous()
        result = worker.forward_batch_generation(part)
        part.input_ids = result.next_token_ids.to(torch.int64)
        tokens.append(part.input_ids)
    return PlainTokens(torch.stack(tokens, dim=1), source_slots, result.logits_output)


def _take_request_options(
    part: ScheduleBatch, batch: ScheduleBatch, indices: Sequence[int]
) -> None:
    """What the requests ask for beside a token."""
    part.has_grammar = any(req.grammar for req in part.reqs)
    part.return_logprob = any(req.return_logprob for req in part.reqs)
    if part.return_logprob:
        part.top_logprobs_nums = [batch.top_logprobs_nums[i] for i in indices]
        part.token_ids_logprobs = [batch.token_ids_logprobs[i] for i in indices]
    part.return_hidden_states = batch.return_hidden_states
    if batch.multimodal_inputs is not None:
        part.multimodal_inputs = [batch.multimodal_inputs[i] for i in indices]
