"""Which rotation a server has, and what it is made of."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from sglang_vericache.config import AUTO, OFF, VeriCacheConfig
from sglang_vericache.loader.checksums import Checksums
from sglang_vericache.loader.client import LoaderClient
from sglang_vericache.loader.copy import PlainCopier, StreamCopier
from sglang_vericache.metrics import OffloadNumbers
from sglang_vericache.rounds.admission import Admission
from sglang_vericache.rounds.draft_room import DraftRoom
from sglang_vericache.rounds.held_prompts import HeldPrompts
from sglang_vericache.rounds.pace import Choice
from sglang_vericache.rounds.policy import RoundPlan
from sglang_vericache.rounds.prompt_fetch import LEAST_S, PromptFetch
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.rounds.rotation import Rotation
from sglang_vericache.rounds.step_watch import StepWatch
from sglang_vericache.tree.integrity import Integrity, Recompute
from sglang_vericache.tree.residency import Residency

# Bytes/s of the link until the first fetch has told: PCIe 4 with 16 lanes.
ASSUMED_LINK_RATE = 20e9
# Whichever thread wants Python's lock waits so long for one that does not let go of it by itself.
# Python's own 5 ms, several times a fetch, make the link twenty times slower beside a busy
# scheduler thread.
SWITCH_INTERVAL_S = 1e-4


class NoRotation:
    """Everything stays attached."""

    needs_views = False

    def before_extend(self, batch: Any) -> None:
        pass

    def step(
        self,
        reqs: Sequence[Any],
        states: Sequence[RequestState],
        committed: Sequence[int],
        views_built: bool,
    ) -> None:
        pass

    def only_drafts_follow(self) -> None:
        return None

    def paced(self, choice: Choice) -> Choice:
        return choice

    def check(
        self,
        reqs: Sequence[Any],
        states: Sequence[RequestState],
        committed: Sequence[int],
        plan: RoundPlan,
    ) -> None:
        pass

    def numbers(self) -> OffloadNumbers:
        return OffloadNumbers()


def create_rotation(
    config: VeriCacheConfig,
    cache: Any,
    rows: torch.Tensor,
    allocator: Any,
    recompute: Recompute,
    room: DraftRoom | None,
    admission: Admission,
) -> Rotation | NoRotation:
    """As ``--vericache-offload`` says, if the host tier could be had."""
    if config.offload == OFF or cache.disable or cache.cache_controller is None:
        return NoRotation()
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
    host = cache.cache_controller.mem_pool_host.anchor_entry.host_pool
    host_layers = [*host.k_data_refs, *host.v_data_refs]
    device_layers = [*host.device_k_buffers, *host.device_v_buffers]
    kind = StreamCopier if rows.device.type == "cuda" else PlainCopier
    checksums = integrity = None
    if config.offload_checksums:
        checksums = Checksums(host_layers, device_layers)
        integrity = Integrity(checksums, recompute)
    loader = LoaderClient(
        kind(host_layers, device_layers, checksums=checksums),
        kind(host_layers, device_layers, checksums=checksums),
        config.loader_watch,
    )
    residency = Residency(cache, rows, loader, integrity)
    watch = prompts = None
    link_tokens = ASSUMED_LINK_RATE / sum(layer[0].nbytes for layer in device_layers)
    if config.offload == AUTO:
        watch = StepWatch(link_tokens, config.horizon)
    if integrity is None:  # else a prefill mends what it reads
        least = max(int(LEAST_S * link_tokens), 1)
        prompts = PromptFetch(residency, least, lambda: admission.prefill_s * link_tokens)
        prompts.held = HeldPrompts(residency, config.verify_width, most_tokens=prompts.pays_from)
    rotation = Rotation(
        *(residency, allocator, config.verify_width, config.fold_tail_tokens),
        *(watch, room, prompts),
    )
    cache.rotation = rotation
    cache.held = None if prompts is None else prompts.held
    return rotation
