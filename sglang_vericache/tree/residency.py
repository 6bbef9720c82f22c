"""Where the full KV of running requests lies, and the legal moves between.

::

                     detach                    order                   all arrived
    ATTACHED (full) --------> DETACHED (empty) -----> FETCHING (empty) -----------> ATTACHED
    device lock               host lock               both                          device lock

The part of a request's row that the tree owns is full or empty: nothing else ever stands in it.
Everything here runs on the scheduler thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_vericache.loader.client import LoaderClient
from sglang_vericache.loader.job import Job
from sglang_vericache.loader.planner import PathPart, Place
from sglang_vericache.tree.integrity import Integrity
from sglang_vericache.tree.loads import Loads

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Seat:
    """One running request.

    Attributes:
        order: by admission.
        place: of its path; the row is full when ATTACHED, else empty.
        since: the step in which it was detached, or had drafted all it may.
        ready: it has drafted all it may.
        unread: its path was attached, and nothing has been computed over it since.
        stays_until: step before which it is not to be detached.
        path: nodes from the root, as they were when last looked at.
        host_lock: receipt that keeps the host copies while the path is not ATTACHED.
        jobs: copies that must arrive before the path is there.
        checkpointed: its output has been inserted below its path while that was arriving.
    """

    req: Any
    order: int
    place: Place = Place.ATTACHED
    since: int = 0
    ready: bool = False
    unread: bool = False
    stays_until: int = 0
    path: tuple[PathPart, ...] = ()
    host_lock: Any = None
    jobs: list[Job] = field(default_factory=list)
    checkpointed: bool = False


class Residency:
    """Detaches and attaches running requests, and knows which row is full.

    Two streams on a GPU. What the tree and the allocator own is changed on the scheduler's, like
    everything that SGLang does there; rows are written on the forward stream, where they are read.

    Args:
        cache: SGLang's radix cache with its host tier.
        rows: ``[R, W]`` main slots by request row and position.
        loader: copies what is fetched.
        integrity: has computed again what comes back changed; None believes the host.

    Attributes:
        ledger_stream: the scheduler's stream; None until it is known, and where there is no GPU.
        changes: counts what may have split nodes or made paths longer.
    """

    def __init__(
        self,
        cache: Any,
        rows: torch.Tensor,
        loader: LoaderClient,
        integrity: Integrity | None = None,
    ) -> None:
        self.cache, self.rows, self.loader, self.integrity = cache, rows, loader, integrity
        self.ledger_stream: torch.cuda.Stream | None = None
        self._on_gpu = rows.device.type == "cuda"
        self._seats: dict[str, Seat] = {}
        self._loads = Loads(cache, loader, self._on_gpu, integrity)
        self._admitted = 0
        self.changes = 0

    def __len__(self) -> int:
        return len(self._seats)

    def seats(self) -> list[Seat]:
        return list(self._seats.values())

    def find(self, req: Any) -> Seat | None:
        return self._seats.get(req.rid)

    def seat_of(self, req: Any) -> Seat:
        seat = self._seats.get(req.rid)
        if seat is None:
            self._admitted += 1
            seat = self._seats[req.rid] = Seat(req, self._admitted)
            self.look_at_path(seat)
        return seat

    def is_full(self, req: Any) -> bool:
        seat = self._seats.get(req.rid)
        return seat is None or seat.place is Place.ATTACHED

    def note_read(self, req: Any) -> None:
        """The step that begins computes over its full KV. Precondition: `is_full`."""
        seat = self._seats.get(req.rid)
        if seat is not None:
            seat.unread = False

    def await_verify(self, req: Any, step: int) -> None:
        """A request that is not full has drafted all it may: its place in the queue counts from
        now on."""
        seat = self._seats.get(req.rid)
        if seat is not None and not seat.ready:
            seat.ready, seat.since = True, step

    def look_at_path(self, seat: Seat) -> None:
        """Nodes split and grow as others come and go."""
        (infos,) = self.cache.tree_core.collect_path_info([seat.req.last_node])
        seat.path = tuple(PathPart(i.node_id, i.path_end - i.path_start) for i in infos)

    @contextmanager
    def _ledger(self) -> Iterator[None]:
        """Inside, on the scheduler's stream."""
        if self.ledger_stream is None:
            yield
            return
        with torch.cuda.stream(self.ledger_stream):
            yield

    # Moves

    def is_complete(self, seat: Seat) -> bool:
        """Whether every node of the path has been copied to the host, to the last byte."""
        if not seat.path or seat.req.lock is None:
            return False
        pending = {
            node
            for write in self.cache.ongoing_write_through.values()
            for node in write.publish_node_ids
        }
        self.look_at_path(seat)
        nodes = [part.node_id for part in seat.path]
        core = self.cache.tree_core
        return not pending.intersection(nodes) and all(core.is_backuped(n) for n in nodes)

    def detach(self, seat: Seat, step: int) -> None:
        """Give the device lock up. Precondition: ATTACHED and `is_complete`."""
        req = seat.req
        if seat.place is not Place.ATTACHED or seat.host_lock is not None:
            raise AssertionError(f"request {req.rid} is {seat.place.value}: cannot be detached")
        receipt = self.cache.inc_host_lock_ref(req.last_node)
        if not receipt.component_host_lock_uuids:
            # Without a complete copy the lock is silently none, and eviction deletes the node.
            raise AssertionError(f"node {req.last_node} has no complete host copy")
        seat.host_lock = receipt.to_dec_params()
        with self._ledger():
            self.cache.unlock(req.lock)
        req.lock = None
        self.rows[req.kv.req_pool_idx, : req.kv.cache_protected_len] = 0
        seat.place, seat.since, seat.ready = Place.DETACHED, step, False

    def mark_reads(self) -> Any:
        """What `order` waits for if the forward stream reads no full KV between here and there;
        None without a GPU, or where a later step may compute damaged KV again."""
        return self._loads.mark() if self.integrity is None else None

    def order(self, seat: Seat, reads: Any = None) -> bool:
        """Lock a detached path and have fetched what is not there. False when the pool has no
        room for it; nothing has changed then.

        Args:
            reads: an event behind the last read of full KV; None for all that the forward stream
                has been given.
        """
        if seat.place is not Place.DETACHED:
            raise AssertionError(f"request {seat.req.rid} is {seat.place.value}: cannot be fetched")
        node = seat.req.last_node
        loads, after = self._loads, reads or self._loads.mark()
        with self._ledger():
            loads.take_over_queued(after)
            if self.cache.tree_core.is_full_device_evicted(node) and not loads.begin(node, after):
                return False
            seat.req.lock = self.cache.lock(node)
        seat.place = Place.FETCHING
        seat.jobs = [load.job for load in loads.on(loads.nodes(node))]
        return True

    def bring(self, node: int) -> bool:
        """Order what is not there of a waiting request's path. False when the pool has no room
        for it; nothing has changed then."""
        with self._ledger():
            return self._loads.begin(node, self._loads.fence())

    def comes(self, node: int) -> bool:
        """Whether something on a path is under way."""
        if not len(self._loads):
            return False
        loads = self._loads.on(self._loads.nodes(node))
        return any(self._loads.is_under_way(load.job) for load in loads)

    @property
    def tokens_on_the_way(self) -> int:
        """Of loads that still lock what they bring."""
        return self._loads.tokens

    def arrive(self, timeout_s: float = 0.0) -> list[Seat]:
        """Attach the requests whose last copy has arrived, after waiting up to ``timeout_s`` for
        one; returns them."""
        self.settle_arrived(timeout_s)
        ready = [
            seat
            for seat in self._seats.values()
            if seat.place is Place.FETCHING
            and not any(self._loads.is_under_way(job) for job in seat.jobs)
        ]
        for seat in ready:
            self._fill(seat)
            seat.place, seat.unread = Place.ATTACHED, True
            self._loads.mend(seat.req)
        return ready

    def settle_arrived(self, timeout_s: float = 0.0) -> None:
        """What has arrived need not be kept by its load any longer."""
        wanted = {job.number for seat in self._seats.values() for job in seat.jobs}
        with self._ledger():  # what nobody wants gives its slots back
            self._loads.settle_arrived(timeout_s, wanted)

    def push(self, seat: Seat) -> None:
        """Give what a request has generated to the tree, so that it can leave the device as well.
        Precondition: ATTACHED."""
        req = seat.req
        if self.ledger_stream is not None:
            self.ledger_stream.wait_stream(torch.cuda.current_stream())  # that wrote the row
        with self._ledger():
            req.refresh_fill_ids()
            known = len(req.full_untruncated_fill_ids)
            self.cache.checkpoint(req, up_to=min(req.kv.kv_committed_len, known))
        if self.ledger_stream is not None:
            torch.cuda.current_stream().wait_stream(self.ledger_stream)
        self.look_at_path(seat)

    def _fill(self, seat: Seat) -> None:
        """Write the row and let the host copy go. Precondition: the path is locked."""
        req = seat.req
        owned = req.kv.cache_protected_len
        with self._ledger():
            slots = self.cache.path_device_indices(req.last_node)
        if len(slots) != owned:
            raise AssertionError(f"path of {len(slots)} tokens, the tree owns {owned} of the row")
        if self._on_gpu:
            stream = torch.cuda.current_stream()
            if self.ledger_stream is not None:
                stream.wait_stream(self.ledger_stream)
                slots.record_stream(stream)
            for job in seat.jobs:
                if job.arrived is not None:
                    stream.wait_event(job.arrived)
        self.rows[req.kv.req_pool_idx, :owned] = slots.to(self.rows.dtype)
        self.cache.dec_host_lock_ref(req.last_node, seat.host_lock)
        seat.host_lock, seat.jobs = None, []

    # Ends

    def fill_for_checkpoint(self, req: Any) -> bool:
        """Make the row of a request that is about to be checkpointed full; False when its path
        has left the device, and the checkpoint must do without."""
        self.changes += 1
        seat = self._seats.get(req.rid)
        if seat is None or seat.place is Place.ATTACHED:
            return True
        if self.integrity is not None:
            # Nothing is inserted below what may have to be mended: nobody would do that.
            under_way = self._loads.on(self._loads.nodes(req.last_node))
            if not all([self._loads.finish(load) for load in under_way]):
                return False
        if self._on_gpu:
            # The forward stream may not have emptied the row yet.
            torch.cuda.current_stream().wait_stream(self.cache.cache_controller.load_fence_stream)
        if seat.place is Place.DETACHED:
            if self.cache.tree_core.is_full_device_evicted(req.last_node):
                return False
            req.lock = self.cache.lock(req.last_node)
        self._fill(seat)
        seat.place, seat.checkpointed = Place.ATTACHED, True
        return True

    def wait_for_checkpoint(self, req: Any) -> None:
        """Its row names the tree's slots now, of nodes also that were on their way back from the
        host while it computed the same tokens itself."""
        if not len(self._loads) or not isinstance(req.last_node, int):
            return
        for load in self._loads.on(self._loads.nodes(req.last_node)):
            self._loads.finish(load)
        self._loads.mend(req)

    def release(self, req: Any) -> None:
        """The request gives its row back; its own device lock is gone already."""
        seat = self._seats.pop(req.rid, None)
        if seat is None:
            return
        if seat.host_lock is not None:
            self.cache.dec_host_lock_ref(req.last_node, seat.host_lock)
        if not seat.checkpointed:
            for job in seat.jobs:
                if not any(job in other.jobs for other in self._seats.values()):
                    self._loads.call_off(job)

    def wait_for_prefill(self, nodes: list[int]) -> None:
        """A prefill is about to read these paths: what is under way on them arrives first.

        Args:
            nodes: the deepest matched node of each request.
        """
        loads = self._loads
        if not len(loads) and not self.cache.cache_controller.load_queue:
            return
        queued = loads.take_over_queued(loads.mark())
        read = set().union(*(loads.nodes(node) for node in nodes)) if nodes else set()
        needed = loads.on(read)
        if self.integrity is not None:
            # SGLang has started none of its own: they are this prefill's.
            needed += [load for load in queued if load not in needed]
        for load in needed:
            loads.finish(load, hurry=load in queued)

    def mend(self, reqs: Sequence[Any]) -> None:
        """What these requests are about to read and came back changed is computed again.
        Precondition: `wait_for_prefill`, or they are ATTACHED."""
        if self.integrity is not None:
            for req in reqs:
                self._loads.mend(req)

    def drain(self) -> None:
        """Before the tree is reset: nothing may be copied afterwards."""
        self._loads.drain()

    def close(self) -> None:
        self.drain()
        self.loader.close()
