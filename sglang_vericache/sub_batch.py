"""Part of a ScheduleBatch, for a forward that not every request takes part in."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode


def sub_batch(
    batch: ScheduleBatch,
    indices: Sequence[int],
    rows: torch.Tensor,
    mode: ForwardMode,
    seq_lens: torch.Tensor,
    input_ids: torch.Tensor,
    out_cache_loc: torch.Tensor,
) -> ScheduleBatch:
    """A shallow copy of ``batch`` with the requests ``indices`` and the given forward inputs.

    Args:
        indices: places in ``batch.reqs``, n of them.
        rows: ``indices`` as an int64 tensor on the batch's device.
        seq_lens: ``[n]``, in the convention of ``mode``.
        input_ids, out_cache_loc: one entry per input token.

    Nothing of the sampling state is taken over; greedy forwards do without.
    """
    part = copy.copy(batch)
    part.reqs = [batch.reqs[i] for i in indices]
    part.forward_mode = mode
    part.req_pool_indices = batch.req_pool_indices[rows]
    part.req_pool_indices_cpu = None
    part.seq_lens = seq_lens
    part.seq_lens_cpu = None
    part.seq_lens_sum = None
    part.orig_seq_lens = batch.orig_seq_lens[rows]
    part.input_ids = input_ids
    part.out_cache_loc = out_cache_loc
    part.spec_info = None
    part.sampling_info = None
    part.has_grammar = False
    part.return_logprob = False
    part.top_logprobs_nums = None
    part.token_ids_logprobs = None
    part.return_hidden_states = False
    part.multimodal_inputs = None
    return part
