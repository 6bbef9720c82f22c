"""Computing the KV of tokens again that a request has read before."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)

from sglang_vericache.upload import to_device

# A piece of a prefill where SGLang does not cut prefills into chunks: activations are per token.
_PIECE = 4096


class Recompute:
    """A prefill of tokens in the middle of a request, which writes into rows that they have.

    Args:
        piece: tokens of one forward; None where the server sets no limit.
    """

    def __init__(self, worker: TpModelWorker, tree_cache: Any, spec_algorithm: Any, piece) -> None:
        self._worker, self._tree_cache, self._algorithm = worker, tree_cache, spec_algorithm
        self._piece = piece if piece and piece > 0 else _PIECE

    def __call__(self, req: Req, start: int, rows: torch.Tensor) -> None:
        """
        Args:
            start: position of the first token.
            rows: ``[n]`` main slots of the tokens from there on.

        Precondition: the request's row of the table is full up to the last of them, and the KV of
        everything before ``start`` is there.
        """
        known = req.origin_input_ids + req.output_ids
        for first in range(0, len(rows), self._piece):
            part = rows[first : first + self._piece]
            begin = start + first
            self._prefill(req, begin, list(known[begin : begin + len(part)]), part)

    def _prefill(self, req: Req, begin: int, tokens: list[int], rows: torch.Tensor) -> None:
        runner = self._worker.model_runner
        batch = ScheduleBatch.init_new(
            [req],
            runner.req_to_token_pool,
            runner.token_to_kv_pool_allocator,
            self._tree_cache,
            runner.model_config,
            False,
            self._algorithm,
        )
        end = begin + len(tokens)
        batch.forward_mode = ForwardMode.EXTEND
        batch.input_ids = to_device(tokens, rows.device)
        batch.out_cache_loc = rows.to(torch.int64)
        batch.req_pool_indices = to_device([req.kv.req_pool_idx], rows.device)
        batch.seq_lens = to_device([end], rows.device)
        batch.seq_lens_cpu = torch.tensor([end], dtype=torch.int64)
        batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
        batch.prefix_lens, batch.extend_lens = [begin], [len(tokens)]
        batch.extend_num_tokens = len(tokens)
        batch.extend_logprob_start_lens = [len(tokens)]
        # Nothing is wanted of this but KV.
        batch.return_logprob, batch.has_grammar, batch.is_prefill_only = False, False, False
        # Every layer's keys and values are there already: no load is waited for.
        self._worker.set_hicache_consumer(-1)
        forward_batch = ForwardBatch.init_new(
            batch,
            runner,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            return_hidden_states_before_norm=False,
        )
        runner.forward(forward_batch)
