"""VERICACHE as a speculative algorithm, and its radix cache, in SGLang's registries.

Registered in every process that loads plugins, so nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_vericache.config import OFF, VeriCacheConfigError
from sglang_vericache.flags import ALGORITHM, RADIX_BACKEND, config_of
from sglang_vericache.host_tier import making_pool, report_room, switch_on
from sglang_vericache.support import validate_model, validate_server


class VeriCacheAlgorithm(CustomSpecAlgo):
    """Answers what SGLang asks of an algorithm; no draft model, no draft weights.

    SGLang 0.5.23 calls create_future_map, need_topk and carries_draft_hidden_states although
    CustomSpecAlgo lacks them (patches/0002). Only a patched one asks for get_output_streamer_class
    (0006), advances_grammar_after_finish (0008), get_worker_pool_bytes (0009), validate_request
    (0010), get_metrics_reporter_class and refine_request_metrics (0011).
    """

    def create_future_map(
        self, device, req_to_token_pool, needs_cpu_seq_lens=True, needs_confidence_relay=False
    ):
        from sglang.srt.managers.overlap_utils import FutureMap

        # The worker reads committed lengths on the host, also where the attention backend
        # (FlashAttention, Triton) does without.
        return FutureMap(device, self, req_to_token_pool, True, needs_confidence_relay)

    def is_speculative(self) -> bool:
        """SGLang asks this where it builds CUDA graphs and warms up: the target model's decode
        graphs are the plain ones, which plain requests replay; verify passes bring their own
        shape, and drafting its own graphs."""
        return False

    def need_topk(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:
        return False

    def get_output_streamer_class(self, draft_worker) -> type:
        from sglang_vericache.output_streamer import streamer_class

        return streamer_class(draft_worker)

    def get_metrics_reporter_class(self) -> type:
        from sglang_vericache.metrics_reporter import VeriCacheMetricsReporter

        return VeriCacheMetricsReporter

    def refine_request_metrics(self, meta_info: dict) -> None:
        from sglang_vericache.hooks.spec_metrics import count_rounds_only

        count_rounds_only(meta_info)

    def validate_request(self, sampling_params, num_input_tokens: int, tokenizer_manager) -> None:
        from sglang_vericache.hooks.request_options import check_request

        check_request(sampling_params, num_input_tokens, tokenizer_manager)

    def advances_grammar_after_finish(self) -> bool:
        # Requests with a grammar are decoded plainly, so they follow the plain order.
        return True

    def get_worker_pool_bytes(self, kv_cache_configurator, budget_bytes: int) -> int:
        from sglang_vericache.hooks.pool_budget import draft_pool_bytes

        return draft_pool_bytes(kv_cache_configurator, budget_bytes)

    def has_draft_kv(self) -> bool:
        # Drafts write to the draft pool; the main pool only needs slots for the verify pass.
        return False

    def handle_server_args(self, server_args: Any) -> None:
        """Declare what the flag implies; everything else stays as the unmodified server's."""
        config = config_of(server_args)
        server_args.speculative_num_steps = config.deepest
        server_args.speculative_eagle_topk = 1
        server_args.speculative_num_draft_tokens = config.verify_width
        server_args.radix_cache_backend = RADIX_BACKEND
        if config.offload != OFF:
            switch_on(server_args, config)


def validate(server_args: Any) -> None:
    """Refuse a server that cannot draft exactly, before anything is loaded.

    Raises:
        VeriCacheConfigError: with the sentence of `support`.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of

    if config_of(server_args) is None:
        raise VeriCacheConfigError(
            f"--speculative-algorithm {ALGORITHM} is set by --enable-vericache: use that flag."
        )
    record = object.__getattribute__(server_args, "_cfg")  # SGLang hands plugins a recorder
    problem = validate_server(server_args) or validate_model(model_config_of(record))
    if problem is not None:
        raise VeriCacheConfigError(problem)


def register() -> None:
    """Make the names known that the flag sets."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    @SpeculativeAlgorithm.register(
        ALGORITHM,
        supports_overlap=True,
        validate_server_args=validate,
        spec_class=VeriCacheAlgorithm,
    )
    def create_worker(server_args: Any) -> type:
        from sglang_vericache.worker import VeriCacheWorker

        return VeriCacheWorker

    def create_cache(context: Any):
        from sglang.srt.mem_cache.registry import create_unified_radix_cache

        from sglang_vericache.cpu import engine, host_pool
        from sglang_vericache.tree.cache import VeriRadixCache

        if context.enable_hierarchical_cache and engine.in_use():
            host_pool.supply()
        config = config_of(context.server_args)
        offloads = config is not None and config.offload != OFF
        if not (offloads and context.enable_hierarchical_cache):
            return create_unified_radix_cache(context, cache_class=VeriRadixCache)
        with making_pool():
            cache = create_unified_radix_cache(context, cache_class=VeriRadixCache)
        host = cache.cache_controller.mem_pool_host.anchor_entry.host_pool
        report_room(host.size, cache.req_to_token_pool.req_to_token.shape[1])
        return cache

    register_radix_cache_backend(RADIX_BACKEND, create_cache)
