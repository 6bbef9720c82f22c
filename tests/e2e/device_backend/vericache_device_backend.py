"""An SGLang plugin that makes torch_native like FlashAttention, the default on Hopper GPUs: it asks
for no lengths on the host, and reads as many tokens of a request as the server verifies at most."""

from __future__ import annotations

import os


def activate() -> None:
    """Loaded in every process; only a scheduler that uses our flag verifies."""
    if not os.environ.get("_SGLANG_VERICACHE_ARMED"):
        return
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.runtime_context import get_spec

    create, forward = TorchNativeAttnBackend.__init__, TorchNativeAttnBackend.forward_extend

    def create_for_device(backend, *args, **kwargs) -> None:
        create(backend, *args, **kwargs)
        backend.speculative_num_draft_tokens = get_spec().speculative_num_draft_tokens

    def forward_fixed(backend, q, k, v, layer, forward_batch, *args, **kwargs):
        if forward_batch.forward_mode.is_target_verify():
            width = q.shape[0] // forward_batch.batch_size
            assert width == backend.speculative_num_draft_tokens, width
        return forward(backend, q, k, v, layer, forward_batch, *args, **kwargs)

    TorchNativeAttnBackend.needs_cpu_seq_lens = False
    TorchNativeAttnBackend.__init__ = create_for_device
    TorchNativeAttnBackend.forward_extend = forward_fixed
