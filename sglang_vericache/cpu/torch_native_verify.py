"""Verify passes on the torch_native attention backend."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_vericache.hooks import Hook


def forward_extend(original, backend, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
    """TARGET_VERIFY reaches the extend path, which wants prefix lengths that a verify batch has
    not."""
    if not forward_batch.forward_mode.is_target_verify():
        return original(backend, q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    if save_kv_cache and k is not None:
        backend.token_to_kv_pool.set_kv_buffer(
            layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v
        )
    keys = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
    values = backend.token_to_kv_pool.get_value_buffer(layer.layer_id)
    table = backend.req_to_token_pool.req_to_token
    width = forward_batch.spec_info.draft_token_num
    queries = q.view(-1, width, layer.tp_q_head_num, layer.qk_head_dim).transpose(1, 2)
    outputs = [
        _attend(
            queries[i : i + 1],
            keys,
            values,
            table[row, : length + width].long(),
            layer.scaling,
        )
        for i, (row, length) in enumerate(
            zip(forward_batch.req_pool_indices, forward_batch.seq_lens.tolist(), strict=True)
        )
    ]
    return torch.cat(outputs).reshape(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """``[w, Hq, D]``; the ``[1, Hq, w, D]`` queries are the last w of the ``[T]`` tokens."""
    width, tokens = query.shape[2], slots.numel()
    visible = torch.ones(width, tokens, dtype=torch.bool).tril(tokens - width)
    output = scaled_dot_product_attention(
        query,
        keys[slots].transpose(0, 1)[None].to(query.dtype),
        values[slots].transpose(0, 1)[None].to(query.dtype),
        attn_mask=visible,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return output[0].transpose(0, 1)


HOOKS = (
    Hook(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend",
        "around",
        forward_extend,
        "torch_native has no TARGET_VERIFY",
        "0007-torch-native-target-verify.patch",
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
        "._run_sdpa_forward_target_verify",
        cpu_only=True,
    ),
)
