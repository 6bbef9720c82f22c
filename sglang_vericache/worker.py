"""The speculative worker: the order of calls in a scheduler step, no arithmetic."""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import (
    get_exec,
    get_observability,
    get_schedule,
    get_server_args,
)
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

from sglang_vericache.compressors.registry import create_scorer
from sglang_vericache.config import AUTO, VeriCacheConfig
from sglang_vericache.draft.backend import DraftAttentionBackend
from sglang_vericache.draft.drafter import Drafter
from sglang_vericache.draft.graphs import DraftGraphs, draft_sizes
from sglang_vericache.draft.query_capture import QueryCapture
from sglang_vericache.draft.rotary import ModelRotary
from sglang_vericache.draft.step import DraftStep
from sglang_vericache.draft_input import PendingTokens
from sglang_vericache.emission import Emission
from sglang_vericache.flags import config_of
from sglang_vericache.graph_capture import prefills_eagerly
from sglang_vericache.host_tier import tier_of
from sglang_vericache.kernels.commit_rows import commit_rows
from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.metrics import DraftCounters, RowBytes
from sglang_vericache.phase_clock import PhaseClock
from sglang_vericache.plain.cached_prompts import CachedPrompts
from sglang_vericache.plain.decoder import decode_plainly
from sglang_vericache.plain.recompute import Recompute
from sglang_vericache.plain.score_only import mark_scoring
from sglang_vericache.pool.sizing import create_pool, create_rows, main_row_bytes
from sglang_vericache.request_options import options_of
from sglang_vericache.rounds.accounting import StepAccount
from sglang_vericache.rounds.admission import Admission
from sglang_vericache.rounds.controller import PLAIN
from sglang_vericache.rounds.draft_room import DraftRoom
from sglang_vericache.rounds.pace import create_pace, horizons_up_to
from sglang_vericache.rounds.policy import RoundPlan
from sglang_vericache.rounds.requests import RunningRequests, remaining_of
from sglang_vericache.rounds.rotation_setup import ASSUMED_LINK_RATE, create_rotation
from sglang_vericache.rounds.step_planner import StepPlanner
from sglang_vericache.rounds.view_keeper import ViewKeeper
from sglang_vericache.status import status_of
from sglang_vericache.support import draft_obstacle, validate_layers
from sglang_vericache.tree.full_kv import FullKV
from sglang_vericache.tree.view_builder import ViewBuilder
from sglang_vericache.tree.warm_up import warm_up
from sglang_vericache.upload import to_device
from sglang_vericache.verify.cascade import Cascade
from sglang_vericache.verify.logits_consumer import create_picker
from sglang_vericache.verify.plan_fence import fence_plans
from sglang_vericache.verify.row_attention import create_row_attention, is_preferred
from sglang_vericache.verify.verifier import PreparedVerify, Verified, Verifier

logger = logging.getLogger(__name__)


class VeriCacheWorker(BaseSpecWorker):
    """Drafts with the target model over compressed KV, verifies over the full KV."""

    def __init__(
        self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: TpModelWorker
    ) -> None:
        super().__init__()
        self.config: VeriCacheConfig = config_of(server_args)
        self._target_worker = target_worker
        self.model_runner = target_worker.model_runner
        problem = validate_layers(self.model_runner.model, self.model_runner.kv_cache_dtype)
        if problem is not None:
            raise ValueError(problem)
        logger.info("vericache settings: %s", self.config)
        self.scorer = create_scorer(self.config.compressor)
        watch = self.scorer.watch
        undoes_rotary = watch is not None and watch.undoes_rotary
        self.rotary = ModelRotary(self.model_runner.model) if undoes_rotary else None
        self.requests: RunningRequests | None = None
        self.prefill_piece = server_args.chunked_prefill_size
        self.drafting, self.admission = True, Admission()
        self.settled = DraftCounters()  # of the step whose yields came last
        self._accounts: deque[StepAccount] = deque()

    @property
    def draft_worker(self) -> None:
        return None  # the target model drafts

    # Start-up, in the order of Scheduler.init_model_worker.

    def alloc_memory_pool(
        self, memory_pool_config=None, req_to_token_pool=None, token_to_kv_pool_allocator=None
    ) -> None:
        super().alloc_memory_pool(memory_pool_config, req_to_token_pool, token_to_kv_pool_allocator)
        main = token_to_kv_pool_allocator.get_kvcache()
        tier = tier_of(get_server_args(), self.config, self.model_runner.model)
        self.pool = create_pool(self.config, main, req_to_token_pool.size, tier)
        self.rows = create_rows(self.config, req_to_token_pool.req_to_token)
        self.row_bytes = RowBytes(self.pool.storage.row_bytes, main_row_bytes(main))
        group = self.model_runner.model_config.num_attention_heads // self.pool.storage.heads
        self.horizons = horizons_up_to(self.config.horizon, group)
        self.on_gpu = torch.device(self.pool.device).type == "cuda"
        self.ahead = self.config.drafts_ahead(
            self.on_gpu and not get_schedule().disable_overlap_schedule
        )
        self.pace = create_pace(self.config, self.horizons, self.on_gpu, self.ahead)
        self.phases = PhaseClock(self.pool.device, get_observability().enable_metrics)
        shape = req_to_token_pool.req_to_token.shape[0], self.config.verify_width
        self.drafts = torch.zeros(shape, dtype=torch.int64, device=self.pool.device)

    def init_attention_backends(self) -> None:
        picker = create_picker(self.config.verify_chunk_rows, self.model_runner)
        query_heads = self.model_runner.model_config.num_attention_heads
        self.draft_backend = DraftAttentionBackend(
            self.pool, self.rows, query_heads, self.req_to_token_pool.size
        )
        self.draft_step = DraftStep(
            self.model_runner,
            self.draft_backend,
            self.rows,
            self.drafts,
            picker,
            self.req_to_token_pool.size,
        )
        max_position = self.model_runner.model_config.context_len - 1
        main = self.token_to_kv_pool_allocator.get_kvcache()
        layers = range(self.pool.storage.layers)
        own, deterministic = None, get_exec().deterministic.enable_deterministic_inference
        self.cached_prompts = CachedPrompts(self.target_worker, deterministic)
        backend = self.model_runner.attn_backend
        preferred = is_preferred(torch.device(self.pool.device), backend)
        if self.config.verifies_with_kernel(preferred, deterministic):
            model, pools = self.model_runner.model, (main, self.req_to_token_pool)
            own = create_row_attention(self.config, model, *pools, layers, query_heads)
        self.verifier = Verifier(self.model_runner, self.drafts, picker, max_position, own)
        self.planner = StepPlanner(self.config, max_position, self.ahead)
        eager = partial(prefills_eagerly, self.model_runner)
        self.capture = QueryCapture(backend, self.scorer.watch, self.rotary, eager)
        attention = next(
            m for m in self.model_runner.model.modules() if type(m).__name__ == "RadixAttention"
        )
        self.full = FullKV(
            keys=LayerBuffers([main.get_key_buffer(layer) for layer in layers]),
            values=LayerBuffers([main.get_value_buffer(layer) for layer in layers]),
            row_table=self.req_to_token_pool.req_to_token,
            scaling=attention.scaling,
            rotary=self.rotary,
        )

    def init_cuda_graphs(self) -> None:
        runner = self.model_runner.decode_cuda_graph_runner
        graphs = None
        if self.on_gpu and runner is not None:
            graphs = DraftGraphs(self.draft_step, draft_sizes(runner.capture_bs))
            graphs.capture()
            horizons = {*self.horizons, self.config.deepest} - {PLAIN}
            widths = [horizon + 1 for horizon in sorted(horizons)]
            self.verifier.capture(widths, max(runner.capture_bs), self.config.cascade == AUTO)
            query_heads = self.model_runner.model_config.num_attention_heads
            dtype = self.model_runner.dtype
            warm_up(self.full, self.pool.storage, self.scorer, query_heads, dtype)
        self.drafter = Drafter(self.draft_step, graphs)
        fence_plans(self.model_runner.attn_backend)

    def _attach_cache(self, batch: ScheduleBatch) -> None:
        """The tree is built after the worker; the first batch brings it."""
        self.tree_cache = batch.tree_cache
        self.views = ViewBuilder(
            self.config, self.scorer, self.pool, self.rows, self.tree_cache.spans, self.full
        )
        self.requests = RunningRequests(
            self.config, self.views, self.capture.observation, self.capture.forget, self.admission
        )
        room = DraftRoom(
            self.views, self.requests, self.tree_cache.path_of, self.requests.budget_of
        )
        self.keeper = ViewKeeper(
            self.config, self.views, self.tree_cache, self.capture, self.pace, self.phases, room
        )
        self.tree_cache.listener, self.tree_cache.admission = self.requests, self.admission
        self.rotation = create_rotation(
            self.config,
            self.tree_cache,
            self.full.row_table,
            self.token_to_kv_pool_allocator,
            Recompute(
                self.target_worker, batch.tree_cache, batch.spec_algorithm, self.prefill_piece
            ),
            room,
            self.admission,
        )
        self.cascade = Cascade(
            self.tree_cache.path_of,
            self.row_bytes.full // self.pool.storage.layers,
            self.config.cascade == AUTO and self.verifier.reads_prefixes_once,
        )
        logger.info("vericache active: %s", self.status())

    # A scheduler step.

    def forward_batch_generation(
        self, batch: ScheduleBatch, on_publish=None, pp_proxy_tensors=None
    ) -> GenerationBatchResult:
        if self.requests is None:
            self._attach_cache(batch)
        if batch.forward_mode.is_decode():
            return self._decode(batch, on_publish)
        return self._extend(batch, on_publish)

    def _extend(self, batch: ScheduleBatch, on_publish) -> GenerationBatchResult:
        self.pace.unusual()
        self.planner.prefill()
        mark_scoring(batch)
        self.rotation.before_extend(batch)  # may wait for what is on its way from the host
        loaded = self.row_bytes.full * sum(req.host_loaded_length for req in batch.reqs)
        self.admission.prefill(batch.extend_num_tokens, loaded / ASSUMED_LINK_RATE)
        if on_publish is not None:  # known before the pass: the next step need not wait for it
            on_publish(batch.seq_lens)
        least = self.config.min_context_tokens if self.drafting else None
        ranges = self.capture.ranges_of(batch, self._may_draft, least)
        if not ranges and self.cached_prompts.are_all(batch):
            result = self.cached_prompts.run(batch)
        else:
            with self.capture.during(ranges):
                result = self.target_worker.forward_batch_generation(batch)
        self.admission.launched()
        result.new_seq_lens = batch.seq_lens
        result.next_draft_input = PendingTokens(result.next_token_ids.to(torch.int64))
        return result

    def _may_draft(self, req: Any) -> bool:
        return draft_obstacle(req, options_of(req, self.config)) is None

    def _decode(self, batch: ScheduleBatch, on_publish) -> GenerationBatchResult:
        pending = batch.spec_info.bonus_tokens
        committed = batch.seq_lens_cpu.tolist()
        states = self.requests.of(batch, committed)
        self.admission.step(sum(not state.released for state in states))
        remaining = remaining_of(batch, committed)
        may_draft = self.keeper.may_draft if self.drafting else None
        choice = self.pace.begin(
            self.requests.describe(states, committed, remaining, may_draft)
            if self.pace.adapts
            else None
        )
        reasons = self.keeper.prepare(
            *(batch.reqs, states, committed, remaining, choice if self.drafting else None),
            self.rotation.needs_views,
            self.planner.prompts_keep_coming,
        )
        self.rotation.step(batch.reqs, states, committed, self.keeper.built)
        if min(remaining) <= 0 or not all(state.steady for state in states):
            self.pace.unusual()  # who has ended does nothing in it, or who rotates something else
        choice = self.rotation.paced(choice)
        plan = self.planner.plan(states, reasons, committed, remaining, choice)
        self.rotation.check(batch.reqs, states, committed, plan)
        plain_steps = self.planner.plain_steps(plan, states, committed, remaining, choice)
        self._tell_pace(plan, plain_steps)
        account = StepAccount(states, committed, reasons, plan, plain_steps)

        # SGLang's own path sets this in TpModelWorker; ours goes past it to the model runner.
        self.target_worker.set_hicache_consumer(-1)
        emission = Emission(batch, pending, self.config.verify_width, on_publish)
        plain = to_device(plan.plain, batch.seq_lens.device) if plan.plain else None
        work, groups = self.cascade.arrange(plan.verify, batch.reqs, states)
        verify = self.verifier.prepare(batch, work, pending, groups) if work else None
        if verify is None:
            emission.publish(plain, plain_steps)
        else:
            self.cascade.count(verify.groups)  # none where no captured shape fits
        first, behind = plan.drafts
        if first:
            account.drafted(first)
            self._draft(batch, first, states, pending, batch.seq_lens)
        if verify is not None:
            verified = self._verify(states, plan.verify, verify, emission)
            emission.publish(plain, plain_steps)
            self._commit_verified(batch, verify, verified)
        if plain is not None:
            self._decode_plainly(batch, plain, plan.plain, states, pending, plain_steps, emission)
        last = self._only_drafts_follow
        if behind:
            account.drafted(behind)
            self._draft(batch, behind, states, pending, batch.seq_lens, last)
        if plan.ahead:
            account.drafted(plan.ahead, ahead=True)
            self._draft(batch, plan.ahead, states, emission.pending, emission.new_lengths, last)
        self._accounts.append(account)
        return emission.result()

    def _tell_pace(self, plan: RoundPlan, plain_steps: int) -> None:
        self.pace.planned(
            plain_steps if plan.only_plain else 0,
            plan.ends_round,
            plan.most_verified,
            plan.plain,
            plan.most_drafted if self.planner.ahead else None,
        )

    def _draft(self, batch, work, states, pending, committed, loaded=None) -> None:
        drafted = [states[i].drafted for i, _ in work]
        with self.phases("draft", self.pace.drafting(work)):
            self.drafter.run(batch, work, drafted, pending, committed, loaded)
        for i, count in work:
            states[i].drafted += count

    def _only_drafts_follow(self) -> None:
        """The rest of the step reads and writes nothing that others than this worker may write:
        SGLang's scheduler waits for this event instead of the whole step where there is one."""
        self.model_runner.shared_read_done_event = self.rotation.only_drafts_follow()

    def _verify(self, states, work, prepared: PreparedVerify, emission: Emission) -> Verified:
        with self.phases("verify", self.pace.verifying(work)):
            verified = self.verifier.run(prepared)
        emission.add_verified(prepared.index, verified)
        for i in prepared.indices:
            states[i].drafted = 0
        return verified

    def _commit_verified(self, batch, prepared: PreparedVerify, verified: Verified) -> None:
        index = prepared.index
        column = torch.arange(verified.tokens.shape[1], device=index.device)
        kept = column < verified.yields[:, None]
        self._commit(batch, index, column[None], kept, verified.source_slots)

    def _decode_plainly(
        self, batch, index, indices, states, pending, steps, emission: Emission
    ) -> None:
        ended = [n for n, i in enumerate(indices) if states[i].released]
        with self.phases("plain"):
            plain = decode_plainly(self.target_worker, batch, index, indices, pending, steps, ended)
        emission.add_plain(index, indices, plain)
        viewed = [n for n, i in enumerate(indices) if states[i].view is not None]
        if viewed:
            part = to_device(viewed, index.device)
            column = torch.arange(steps, device=index.device)
            kept = torch.ones((len(viewed), steps), dtype=torch.bool, device=index.device)
            self._commit(batch, index[part], column[None], kept, plain.source_slots[part])
            for n in viewed:
                states[indices[n]].drafted = 0

    def _commit(self, batch, index, column, kept, source_slots) -> None:
        """Exact KV of the tokens just read into the tails, where ``kept``."""
        requests = batch.req_pool_indices[index]
        lengths = batch.seq_lens[index] + self.rows.offsets[requests]
        targets = self.rows.table[requests[:, None], lengths[:, None] + column].to(torch.int64)
        targets = torch.where(kept, targets, torch.zeros_like(targets))
        with self.phases("commit"):
            commit_rows(
                self.full.keys,
                self.full.values,
                source_slots.flatten(),
                self.pool.storage,
                targets.flatten(),
            )

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: list[int], batch_size: int = 0
    ) -> None:
        """SGLang read a step's yields back; results come in the order of the steps."""
        account = self._accounts.popleft()
        self.settled = account.settle(num_correct_drafts_per_req, self.requests.total)

    def switch_drafting(self, on: bool) -> None:
        """Between steps: running requests go on plainly, or draft again, from the next one."""
        logger.info("vericache drafting is switched %s", "on" if on else "off")
        self.drafting = on
        if not on and self.requests is not None:
            for state in self.requests:
                self.keeper.close(state)

    def get_update_handlers(self) -> dict[str, tuple]:
        """SGLang asks this for run-time settings where it is patched (patches/0012)."""
        from sglang_vericache.hooks.internal_state import update_handlers

        return update_handlers(self)

    def clear_cache_pool(self) -> None:
        """flush_cache: the tree has dropped its spans; nothing else of ours outlives requests."""

    def get_internal_state(self) -> dict[str, Any]:
        """SGLang asks this for its info endpoint where it is patched (patches/0006)."""
        return {"vericache": self.status()}

    def status(self) -> dict[str, Any]:
        return status_of(self)
