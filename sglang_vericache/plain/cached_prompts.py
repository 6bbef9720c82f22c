"""Prefills of prompts that are in the cache: the last token of each is all there is to compute."""

from __future__ import annotations

import copy

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_vericache.support import is_token_by_token


class CachedPrompts:
    """One token of each request is what a decode step computes, and SGLang has a CUDA graph of
    that. It captures none of a prefill of fewer than four tokens, and launching its kernels one by
    one takes the host longer than the device.

    Args:
        worker: of the target model.
        deterministic: the server promises KV that does not depend on the kernel a token came
            through.

    Attributes:
        passes: prefills that were decode steps.
    """

    def __init__(self, worker: TpModelWorker, deterministic: bool) -> None:
        self._worker, self._deterministic = worker, deterministic
        self.passes = 0

    def are_all(self, batch: ScheduleBatch) -> bool:
        """Whether the batch wants nothing but a token behind prompts whose KV is there."""
        return (
            batch.forward_mode == ForwardMode.EXTEND
            and not self._deterministic
            and batch.chunked_req is None
            and not batch.is_prefill_only
            and batch.replace_embeds is None
            and all(count == 1 for count in batch.extend_lens)
            and all(start > 0 for start in batch.prefix_lens)
            and not any(is_token_by_token(req) for req in batch.reqs)
        )

    def run(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """Precondition: `are_all`."""
        self.passes += 1
        # A graph waits for no layer: all of what SGLang loads from the host has to be there.
        self._worker.set_hicache_consumer(batch.hicache_consumer_index)
        loaded = self._worker.hicache_layer_transfer_counter
        if loaded is not None:
            loaded.wait_until(loaded.num_layers - 1)
        step = copy.copy(batch)
        step.forward_mode, step.spec_info = ForwardMode.DECODE, None
        step.is_extend_in_batch = False
        return self._worker.forward_batch_generation(step)
