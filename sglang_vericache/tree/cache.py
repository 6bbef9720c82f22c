"""SGLang's radix cache with spans: the stock tree core, told when nodes and requests go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_vericache.metrics import SpanCounters
from sglang_vericache.tree.integrity import Integrity
from sglang_vericache.tree.residency import Residency
from sglang_vericache.tree.span_table import SpanTable
from sglang_vericache.tree.view_plan import PathNode, SpanInfo


class RequestListener(Protocol):
    """Who holds draft views of running requests."""

    def on_checkpoint(self, req: Req, path: tuple[PathNode, ...]) -> None:
        """The request's tokens up to ``path[-1].end`` are in the tree now."""

    def on_release(self, req: Req) -> None:
        """The request gives its row back: it finished, was aborted or retracted."""


class Admission(Protocol):
    """When waiting requests are let in."""

    def holds(self, fitting: int, waiting: int) -> bool:
        """Whether the next of ``waiting`` requests, of which so many fit, is to wait for more."""


class HeldPrompts(Protocol):
    """Brings the prompts of requests that are not let in yet."""

    looks_on: bool

    def begin_pass(self) -> None:
        """The scheduler asks about its waiting requests anew."""

    def fitting(self, req: Req, remaining: int, growth: int) -> int:
        """Requests like this one for which so many tokens are enough."""

    def hold(self, req: Req, fitting: int, remaining: int) -> None:
        """The first of the queue waits."""

    def let_go(self) -> None:
        """It does not."""

    def pass_over(self, req: Req, remaining: int) -> None:
        """One behind it."""


class Rotation(Protocol):
    """Who detaches running requests."""

    residency: Residency

    def lets_in_alone(self, req: Req) -> bool:
        """Whether a waiting request is not to wait for others to be let in with it."""

    def poll(self) -> None:
        """Called between steps, and while nothing runs."""

    def may_admit(self, req: Req, remaining: int, growth: int) -> bool:
        """See `VeriRadixCache.may_admit`."""

    def was_refused(self, shortage: int) -> None:
        """See `VeriRadixCache.on_refusal`."""

    def is_sound(self, reqs: Sequence[Req]) -> bool:
        """See `VeriRadixCache.may_decode`."""


class VeriRadixCache(UnifiedRadixCache):
    """UnifiedRadixCache whose nodes can own spans."""

    def __init__(self, params) -> None:
        # super().__init__ resets the tree, and the reset clears the table.
        self.spans = SpanTable(SpanCounters())
        self.listener: RequestListener | None = None
        self.rotation: Rotation | None = None
        self.admission: Admission | None = None
        self.held: HeldPrompts | None = None
        super().__init__(params)

    def path_of(self, req: Req) -> tuple[PathNode, ...]:
        """Nodes from the root to the last one that the tree holds of this request."""
        if self.disable or req.last_node is None:
            return ()
        (infos,) = self.tree_core.collect_path_info([req.last_node])
        return tuple(
            PathNode(
                node_id=info.node_id,
                start=info.path_start,
                end=info.path_end,
                children=info.num_children,
                span=self._span_info(info.node_id),
            )
            for info in infos
        )

    def node_read_by(self, req: Req) -> int | None:
        """The deepest node whose KV a prefill of this request reads.

        A request of a streaming session names a node of the session's own, from its first prefill
        on; the session holds the lock of the real one.
        """
        slot = self.session.borrowed_slot(req)
        if slot is None:
            return req.last_node
        return slot.lock.node if slot.lock is not None else None

    def holds_prompt(self, req: Req, prompt_tokens: int) -> bool:
        """Whether the checkpoint after the prefill has been made, if there is to be one."""
        return self.disable or req.kv.cache_protected_len >= prompt_tokens

    def _span_info(self, node_id: int) -> SpanInfo | None:
        span = self.spans.get(node_id)
        return (
            SpanInfo(span.start, span.rows, span.scope, span.budget) if span is not None else None
        )

    # A request's life, as release_kv_cache and checkpoint_kv_cache drive it.

    def checkpoint_into_tree(self, req: Req, *, up_to: int, **kwargs) -> None:
        if self.rotation is not None and not self.rotation.residency.fill_for_checkpoint(req):
            return  # what it generated is not kept: bringing its path back would cost more
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        if self.rotation is not None and not req.finished():
            self.rotation.residency.wait_for_checkpoint(req)
        if self.listener is not None:
            self.listener.on_checkpoint(req, self.path_of(req))

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        if self.listener is not None:
            self.listener.on_release(req)
        if self.rotation is not None:
            self.rotation.residency.release(req)
        super().on_release(req, checkpointed=checkpointed)

    def claim_kv_row(self, req: Req) -> bool:
        claimed = super().claim_kv_row(req)
        if claimed and self.listener is not None:
            # A streaming session keeps the row; release_kv_cache returns before on_release.
            self.listener.on_release(req)
        return claimed

    # What SGLang's scheduler asks: by hooks/pool_room.py, or itself where it is patched.

    def may_admit(self, req: Req, remaining_tokens: int, growth_tokens: int, waiting: int) -> bool:
        """Whether one more request may be admitted now, as far as the cache knows better.

        Args:
            remaining_tokens: what the scheduler has left to admit.
            growth_tokens: what the request may take beside its prompt.
            waiting: requests, this one included; 0 where others are admitted, or preempted for it,
                in the same pass.
        """
        rotation, held = self.rotation, self.held
        if held is not None and held.looks_on:  # somebody before it waits
            held.pass_over(req, remaining_tokens)
            return False
        together = rotation is None or not rotation.lets_in_alone(req)
        if waiting and self.admission is not None and together:
            if held is not None:
                fitting = held.fitting(req, remaining_tokens, growth_tokens)
            else:  # what the device has of the prompt may be locked by others
                own = len(req.full_untruncated_fill_ids) - req.prefix_len + growth_tokens
                fitting = remaining_tokens // max(own, 1)
            if self.admission.holds(fitting, waiting):
                if held is not None:
                    held.hold(req, fitting, remaining_tokens)
                return False
        if held is not None:
            held.let_go()
        return rotation is None or rotation.may_admit(req, remaining_tokens, growth_tokens)

    def looks_on(self) -> bool:
        """Whether the scheduler is to ask about the next waiting request after a refusal: that one
        is not admitted either, but its prompt may be brought."""
        return self.held is not None and self.held.looks_on

    def on_refusal(self, shortage_tokens: int) -> bool:
        """The scheduler refused a request for want of so many tokens. True when asking again may
        help although no request has left."""
        if self.rotation is not None:
            self.rotation.was_refused(shortage_tokens)
        return self.rotation is not None

    def may_decode(self, reqs: Sequence[Req]) -> bool:
        """Whether these requests can go on together; some are retracted otherwise."""
        return self.rotation is None or self.rotation.is_sound(reqs)

    # A node's end. Evicted and backed up on the host, it lives on and keeps its span.

    def _evict_device_leaf(self, node_id, tracker):
        backup = super()._evict_device_leaf(node_id, tracker)
        self._drop_if_gone(node_id)
        return backup

    def _drop_subtree_no_host(self, node_id, tracker):
        dropped = super()._drop_subtree_no_host(node_id, tracker)
        for node in self.spans.nodes():
            self._drop_if_gone(node)
        return dropped

    def check_hicache_events(self) -> None:
        super().check_hicache_events()
        if self.held is not None:
            self.held.begin_pass()
        if self.rotation is not None:
            self.rotation.poll()

    # What is written to the host has a checksum, and what comes back is checked by the loader.

    @property
    def _integrity(self) -> Integrity | None:
        return None if self.rotation is None else self.rotation.residency.integrity

    def _execute_kv_backup(self, node_id, device_value, comp_xfers, sidecar_xfers):
        host_indices = super()._execute_kv_backup(node_id, device_value, comp_xfers, sidecar_xfers)
        if self._integrity is not None and host_indices is not None:
            self._integrity.note_write(node_id, host_indices, device_value)
        return host_indices

    def _finish_write_through_ack(self, ack_id: int) -> None:
        if self._integrity is not None:
            self._integrity.seal(ack_id)
        super()._finish_write_through_ack(ack_id)

    def ready_to_load_host_cache(self) -> int:
        if self._integrity is not None:
            return -1  # nothing was started: Residency.wait_for_prefill has the loader fetch it
        return super().ready_to_load_host_cache()

    def _reset_full(self) -> None:
        if self.rotation is not None:
            self.rotation.residency.drain()
        super()._reset_full()
        self.spans.clear()

    def _drop_if_gone(self, node_id: int) -> None:
        if self.spans.knows(node_id) and not self._alive(node_id):
            self.spans.drop(node_id)

    def _alive(self, node_id: int) -> bool:
        try:
            self.tree_core.is_backuped(node_id)
        except KeyError:
            return False
        return True
