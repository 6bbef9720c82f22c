"""Attention of a verify pass by the kernel that draft steps use, over the full KV.

A pass has a few queries a request, which fill one tile of the tensor cores where the heads of a
group are few. The kernel reads the slots of each request from SGLang's table of them and its length
from the device, so nothing is planned on the host, and stores the new keys and values itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_vericache.config import OFF, TRITON, VeriCacheConfig, VeriCacheConfigError
from sglang_vericache.kernels.draft_attention import most_query_rows
from sglang_vericache.kernels.pool_format import PoolStorage
from sglang_vericache.row_table_attention import RowTableAttention

logger = logging.getLogger(__name__)

HOPPER = 9  # compute capability
# Whose place it takes unasked: attention of a decoder over all tokens, and nothing else.
DENSE_BACKENDS = ("FlashInferAttnBackend", "FlashAttentionBackend", "TritonAttnBackend")


@dataclass(frozen=True)
class VerifyRows:
    """What all layers of a pass read.

    Attributes:
        lengths: ``[B]`` tokens of each request, the ``width`` that are verified included.
    """

    lengths: torch.Tensor
    width: int


class RowAttention(RowTableAttention):
    """Serves verify passes beside the target's own backend, which goes on serving the rest."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        width = forward_batch.spec_info.draft_token_num
        self.forward_metadata = VerifyRows(forward_batch.seq_lens + width, width)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        asked = [name for name, value in kwargs.items() if value is not None]
        if asked:
            raise ValueError(
                "the kernel of --vericache-verify-attention does not fit this model, whose "
                f"attention has {', '.join(asked)}: that flag accepts backend."
            )
        rows: VerifyRows = self.forward_metadata
        return self.attend((q, k, v), layer, forward_batch, rows.lengths, rows.width, save_kv_cache)

    def forward_decode(self, *args, **kwargs):
        raise AssertionError("verify passes only")


def is_preferred(device: torch.device, backend: Any) -> bool:
    """Whether the kernel verifies in place of the server's ``backend`` unless told otherwise.

    On Hopper GPUs, where it was faster than FlashInfer: its launch constants are those of an H200,
    and may not even fit where shared memory is smaller.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    hopper = torch.cuda.get_device_capability(device)[0] == HOPPER
    return hopper and type(backend).__name__ in DENSE_BACKENDS


def create_row_attention(
    config: VeriCacheConfig,
    model: torch.nn.Module,
    pool: Any,
    req_to_token_pool: Any,
    layers: Sequence[int],
    query_heads: int,
) -> RowAttention | None:
    """None where the kernel does not serve the model, or the widest pass.

    Raises:
        VeriCacheConfigError: the same, and nothing but the kernel will do.
    """
    most, widest = req_to_token_pool.size, config.verify_width
    storage = None
    try:
        storage = PoolStorage.over(
            [pool.get_key_buffer(layer) for layer in layers],
            [pool.get_value_buffer(layer) for layer in layers],
        )
        group = query_heads // storage.heads
        problem = unserved_layer(model) or too_wide(config, most_query_rows(storage), group)
    except ValueError as error:
        problem = (
            f"the kernel of --vericache-verify-attention does not fit the KV pool: {error}. "
            "--vericache-verify-attention backend serves any."
        )
    if problem is not None and config.verify_attention == TRITON:
        raise VeriCacheConfigError(problem)
    if storage is None or problem is not None:
        logger.info("Verify passes go through the server's attention backend: %s", problem)
        return None
    return RowAttention(pool, req_to_token_pool, storage, query_heads, most, widest)


def unserved_layer(model: torch.nn.Module) -> str | None:
    """What the attention of some layer has that the kernel does not compute."""
    for name, module in model.named_modules():
        what = "sinks" if getattr(module, "sinks", None) is not None else None
        if type(module).__name__ == "RadixAttention":
            what = what or _beyond_the_kernel(module)
        if what is not None:
            return (
                "the kernel of --vericache-verify-attention does not fit this model: attention of "
                f"{name} has {what}. --vericache-verify-attention backend serves it."
            )
    return None


def _beyond_the_kernel(layer: Any) -> str | None:
    """Of SGLang's RadixAttention, what is not a scaled and perhaps capped product of a decoder."""
    kind = getattr(layer.attn_type, "value", layer.attn_type)
    scales = {layer.k_scale_float, layer.v_scale_float}
    for found, what in (
        (layer.xai_temperature_len > 0, "a temperature"),
        (layer.use_irope, "chunks that see only themselves"),
        (layer.is_cross_attention, "keys of an encoder"),
        (kind != "decoder", f"the mask of {kind} attention"),
        (layer.v_head_dim != layer.qk_head_dim, "values of another size than its keys"),
        (layer.logit_cap and layer.logit_capping_method != "tanh", "a cap other than tanh"),
        (not scales <= {None, 1.0}, "scaled keys or values"),
    ):
        if found:
            return what
    return None


def too_wide(config: VeriCacheConfig, most_rows: int | None, group: int) -> str | None:
    """Why the kernel cannot verify as wide as the horizon asks for.

    Args:
        most_rows: see `most_query_rows`.
        group: query heads of a kv head.
    """
    rows = config.verify_width * group
    if most_rows is None or rows <= most_rows:
        return None
    tokens = most_rows // group
    horizon = (tokens if config.offload == OFF else tokens // 2) - 1
    served = f"It serves --vericache-horizon up to {horizon}; " if horizon > 0 else ""
    return (
        f"the kernel of --vericache-verify-attention holds {most_rows} rows of queries of this "
        f"model: {config.verify_width} tokens of {group} query heads for each kv head are {rows}. "
        f"{served}--vericache-verify-attention backend serves any."
    )


class RowPlan:
    """Stands for `ChainPlan` where there is nothing to plan."""

    def __init__(self, backend: RowAttention, width: int) -> None:
        self.backend, self.width = backend, width
        self.metadata: VerifyRows | None = None

    def fits(self, committed: Sequence[int]) -> bool:
        return True

    def plan(self, committed: Sequence[int]) -> None:
        pass

    def fill_indices(
        self, req_to_token: torch.Tensor, requests: torch.Tensor, committed: torch.Tensor
    ) -> None:
        """Set the lengths that the pass reads; on the device only."""
        self.metadata = VerifyRows(committed + self.width, self.width)
