"""The draft pool's share of the KV memory."""

from __future__ import annotations

import logging

from sglang_vericache.flags import config_of
from sglang_vericache.hooks import Hook

logger = logging.getLogger(__name__)


def config_from_budget(original, configurator, budget_bytes, **kwargs):
    """Take the draft pool's bytes before SGLang sizes the main pool from what is left."""
    from sglang.srt.runtime_context import get_server_args

    if config_of(get_server_args()) is None or configurator.is_draft_worker:
        return original(configurator, budget_bytes, **kwargs)
    taken = draft_pool_bytes(configurator, budget_bytes)
    return original(configurator, budget_bytes - taken, **kwargs)


def draft_pool_bytes(configurator, budget_bytes: int) -> int:
    """What the draft pool takes of the budget of SGLang's KVCacheConfigurator."""
    from sglang.srt.runtime_context import get_parallel, get_server_args

    from sglang_vericache.host_tier import tier_of
    from sglang_vericache.kernels.pool_format import DenseFormat, create_format
    from sglang_vericache.pool.sizing import draft_share_bytes

    config = config_of(get_server_args())
    model = configurator.model_config
    heads = model.get_num_kv_heads(get_parallel().attn_tp_size)
    rows = configurator.layer_info.num_effective_layers * heads
    dtype = configurator.kv_cache_dtype
    formats = DenseFormat(dtype), create_format(config.draft_dtype, dtype, model.head_dim)
    main, draft = (each.row_bytes(model.head_dim) * rows for each in formats)
    tier = tier_of(get_server_args(), config, configurator.model)
    taken = draft_share_bytes(config, budget_bytes, main, draft, tier)
    logger.info("Draft KV pool takes %.2f of %.2f GiB.", taken / 2**30, budget_bytes / 2**30)
    return taken


HOOKS = (
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget",
        "around",
        config_from_budget,
        "the main pool would take all memory before the draft pool is built",
        "0009-pool-budget.patch",
        "sglang.srt.speculative.spec_registry.CustomSpecAlgo.get_worker_pool_bytes",
    ),
)
