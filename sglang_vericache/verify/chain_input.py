"""What an attention backend is told of a verify pass."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.eagle_info import EagleVerifyInput


class ChainVerifyInput(EagleVerifyInput):
    """An eagle verify input whose tree is a chain: causal attention, no mask.

    SGLang's own fills a mask of every query against every key for its FlashInfer backend, which
    for long contexts is larger than the KV that it masks.
    """

    def generate_attn_arg_prefill(
        self,
        *,
        req_pool_indices: torch.Tensor,
        paged_kernel_lens: torch.Tensor,
        paged_kernel_lens_sum: int,
        translator,
        plan,
        kind=None,
    ):
        """CSR arguments of FlashInfer's paged prefill: ``draft_token_num`` queries a request over
        its committed tokens (``paged_kernel_lens``) and those queries' own."""
        device, count = req_pool_indices.device, req_pool_indices.numel()
        width = self.draft_token_num
        query_indptr = torch.arange(0, (count + 1) * width, width, dtype=torch.int32, device=device)
        lengths = paged_kernel_lens + width
        kv_indptr = torch.zeros(count + 1, dtype=torch.int32, device=device)
        kv_indptr[1:] = torch.cumsum(lengths, dim=0)
        kv_indices = torch.empty(
            paged_kernel_lens_sum + width * count, dtype=torch.int32, device=device
        )
        options = {} if kind is None else {"kind": kind}
        translator.pack_read_stream(
            plan,
            req_pool_indices=req_pool_indices,
            seq_lens=lengths,
            indptr=kv_indptr,
            out=kv_indices,
            num_token_blocks=None,
            kv_lens_sum=paged_kernel_lens_sum,
            **options,
        )
        return kv_indices, kv_indptr, query_indptr, None


def chain_verify_input(
    tokens: torch.Tensor, positions: torch.Tensor, width: int
) -> ChainVerifyInput:
    """Input of a pass that reads ``width`` tokens of each request.

    Args:
        tokens, positions: ``[n * width]``.
    """
    return ChainVerifyInput(
        draft_token=tokens,
        custom_mask=None,
        positions=positions,
        retrieve_index=None,
        retrieve_next_token=None,
        retrieve_next_sibling=None,
        retrieve_cum_len=None,
        spec_steps=width - 1,
        topk=1,
        draft_token_num=width,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        seq_lens_sum=None,
        seq_lens_cpu=None,
    )


def fixed_width(backend: Any) -> int | None:
    """Tokens of a request that an attention backend of SGLang reads in every verify pass.

    FlashAttention and others are told the most of the server when they are made and ask no pass for
    its own. Triton does, but all that were told get what they were told: it is right for each.
    None: as many as the pass says.
    """
    parts = [getattr(backend, name, None) for name in ("prefill_backend", "decode_backend")]
    names = ("speculative_num_draft_tokens", "num_draft_tokens")
    widths = [getattr(part, name, None) for part in (backend, *parts) for name in names]
    return max((width for width in widths if width), default=None)
