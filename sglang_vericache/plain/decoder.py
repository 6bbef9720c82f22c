"""Plain decoding of some requests: SGLang's own forward and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_vericache.plain.sampling import select_sampling
from sglang_vericache.sub_batch import sub_batch


@dataclass(frozen=True)
class PlainStep:
    """One token of each of n requests.

    Attributes:
        tokens: ``[n]``.
        source_slots: ``[n]`` int64 main slots of the tokens that were read; their KV is there now.
        output: logits and log-probabilities, rows in the order of the requests.
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
) -> PlainStep:
    """Decode requests ``indices`` by one token, exactly as SGLang does without speculation.

    Args:
        index: ``indices`` as an int64 tensor on the device.
        pending: ``[bs]`` the token of each request whose KV is not computed yet.
    """
    requests, committed = batch.req_pool_indices[index], batch.seq_lens[index]
    source_slots = batch.req_to_token_pool.req_to_token[requests, committed].to(torch.int64)
    part = sub_batch(
        batch,
        indices,
        index,
        ForwardMode.DECODE,
        committed + 1,
        pending[index],
        source_slots,
    )
    part.seq_lens_cpu = batch.seq_lens_cpu[list(indices)] + 1
    part.orig_seq_lens = part.orig_seq_lens + 1
    _take_request_options(part, batch, indices)
    part.sampling_info = select_sampling(batch, indices, index)
    result: GenerationBatchResult = worker.forward_batch_generation(part)
    return PlainStep(result.next_token_ids, source_slots, result.logits_output)


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
