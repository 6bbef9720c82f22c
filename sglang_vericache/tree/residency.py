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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_vericache.loader.client import LoaderClient
from sglang_vericache.loader.job import Job
from sglang_vericache.loader.planner import PathPart, Place

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Seat:
    """One running request.

    Attributes:
        order: by admission.
        place: of its path; the row is full when ATTACHED, else empty.
        since: the step in which it was detached, or had drafted all it may.
        ready: it has drafted all it may.
        attached: the step in which its path was last attached.
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
    attached: int = 0
    stays_until: int = 0
    path: tuple[PathPart, ...] = ()
    host_lock: Any = None
    jobs: list[Job] = field(default_factory=list)
    checkpointed: bool = False


@dataclass(frozen=True)
class Load:
    """Nodes that are on the device already by the tree's book, and whose bytes are under way.

    Attributes:
        anchor: the deepest of them.
        start: where they begin on the anchor's path.
    """

    job: Job
    anchor: int
    start: int


class Residency:
    """Detaches and attaches running requests, and knows which row is full.

    Two streams on a GPU. What the tree and the allocator own is changed on the scheduler's, like
    everything that SGLang does there; rows are written on the forward stream, where they are read.

    Args:
        cache: SGLang's radix cache with its host tier.
        rows: ``[R, W]`` main slots by request row and position.
        loader: copies what is fetched.

    Attributes:
        ledger_stream: the scheduler's stream; None until it is known, and where there is no GPU.
        changes: counts what may have split nodes or made paths longer.
    """

    def __init__(self, cache: Any, rows: torch.Tensor, loader: LoaderClient) -> None:
        self.cache, self.rows, self.loader = cache, rows, loader
        self.ledger_stream: torch.cuda.Stream | None = None
        self._on_gpu = rows.device.type == "cuda"
        self._seats: dict[str, Seat] = {}
        self._loads: dict[int, Load] = {}
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

    def order(self, seat: Seat) -> bool:
        """Lock a detached path and have fetched what is not there. False when the pool has no
        room for it; nothing has changed then."""
        if seat.place is not Place.DETACHED:
            raise AssertionError(f"request {seat.req.rid} is {seat.place.value}: cannot be fetched")
        node = seat.req.last_node
        after = self._mark()
        with self._ledger():
            self._take_over_queued(after)
            if self.cache.tree_core.is_full_device_evicted(node) and not self._load(node, after):
                return False
            seat.req.lock = self.cache.lock(node)
        seat.place = Place.FETCHING
        nodes = self._nodes(node)
        seat.jobs = [x.job for x in self._loads.values() if nodes & self._pending_nodes(x)]
        return True

    def arrive(self, step: int, timeout_s: float = 0.0) -> list[Seat]:
        """Attach the requests whose last copy has arrived, after waiting up to ``timeout_s`` for
        one; returns them."""
        self.settle_arrived(timeout_s)
        ready = [
            seat
            for seat in self._seats.values()
            if seat.place is Place.FETCHING
            and not any(job.number in self._loads for job in seat.jobs)
        ]
        for seat in ready:
            self._fill(seat)
            seat.place, seat.attached = Place.ATTACHED, step
        return ready

    def settle_arrived(self, timeout_s: float = 0.0) -> None:
        """What has arrived need not be kept by its load any longer."""
        for job in self.loader.poll(timeout_s):
            self._settle(job)

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

    def release(self, req: Any) -> None:
        """The request gives its row back; its own device lock is gone already."""
        seat = self._seats.pop(req.rid, None)
        if seat is None:
            return
        if seat.host_lock is not None:
            self.cache.dec_host_lock_ref(req.last_node, seat.host_lock)
        if not seat.checkpointed:
            for job in seat.jobs:
                self._call_off(job)

    def _call_off(self, job: Job) -> None:
        """Nobody is known to wait for a copy any more: withdraw it, and its nodes leave the
        device as they came. One that has begun, or that others read, just arrives."""
        load = self._loads.get(job.number)
        if load is None or any(job in seat.jobs for seat in self._seats.values()):
            return
        nodes = [info.node_id for info in self._infos(load.anchor) if info.path_start >= load.start]
        if not self._held_by_load_only(load) or not self.loader.cancel(job):
            return
        self._settle(job)
        for node in reversed(nodes):
            self.cache._demote(node, _Counts())

    def _held_by_load_only(self, load: Load) -> bool:
        """Whether only the load itself keeps its nodes on the device: a prefill may have matched
        them."""
        held = self.cache.ongoing_load_back[load.anchor]
        self.cache.dec_lock_ref(load.anchor, held.lock_params)
        taken = self.cache.inc_lock_ref(load.anchor)
        anew = held._replace(lock_params=taken.to_dec_params())
        self.cache.ongoing_load_back[load.anchor] = anew
        return taken.delta is not None and taken.delta >= load.job.tokens

    def wait_for_prefill(self, nodes: list[int]) -> None:
        """A prefill is about to read these paths: what is under way on them arrives first.

        Args:
            nodes: the deepest matched node of each request.
        """
        if not self._loads:
            return
        self._take_over_queued(self._mark())
        read = set().union(*(self._nodes(node) for node in nodes)) if nodes else set()
        for load in list(self._loads.values()):
            if read & self._pending_nodes(load):
                self.loader.finish(load.job)
                if self._on_gpu and load.job.arrived is not None:
                    torch.cuda.current_stream().wait_event(load.job.arrived)
                self._settle(load.job)

    def drain(self) -> None:
        """Before the tree is reset: nothing may be copied afterwards."""
        self.loader.drain()
        for load in list(self._loads.values()):
            self._settle(load.job)

    def close(self) -> None:
        self.drain()
        self.loader.close()

    # Loads

    def _infos(self, node: int) -> tuple[Any, ...]:
        (infos,) = self.cache.tree_core.collect_path_info([node])
        return infos

    def _nodes(self, node: int) -> set[int]:
        return {info.node_id for info in self._infos(node)}

    def _pending_nodes(self, load: Load) -> set[int]:
        """A split leaves the anchor its id and gives the part before it a new one."""
        return {i.node_id for i in self._infos(load.anchor) if i.path_start >= load.start}

    def _mark(self) -> Any:
        """An event behind everything that the current stream has been given: on the forward
        stream, behind all that may still read what is evicted now."""
        if not self._on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _load(self, node: int, after: Any) -> bool:
        """Give the evicted nodes of a path slots and order the copy."""
        start = next(i.path_start for i in self._infos(node) if i.full_value_len is None)
        cache = self.cache
        # Below its threshold SGLang would rather compute: we must have the path.
        threshold, cache.load_back_threshold = cache.load_back_threshold, 1
        try:
            if not cache.load_back(node):
                return False
        finally:
            cache.load_back_threshold = threshold
        self._hand_over(cache.cache_controller.load_queue.pop(), start, after)
        return True

    def _take_over_queued(self, after: Any) -> None:
        """Loads that an admission queued and did not start, for a prefill that was put off: they
        are on nobody's way, but their nodes look as if they were there."""
        queue = self.cache.cache_controller.load_queue
        while queue:
            operation = queue.pop(0)
            (node,) = operation.node_ids
            end = sum(i.path_end - i.path_start for i in self._infos(node))
            self._hand_over(operation, end - len(operation.host_indices), after)

    def _hand_over(self, operation: Any, start: int, after: Any) -> None:
        events = (after, self._mark()) if self._on_gpu else ()
        job = self.loader.fetch(operation.host_indices, operation.device_indices, events)
        (node,) = operation.node_ids
        self._loads[job.number] = Load(job, node, start)

    def _settle(self, job: Job) -> None:
        """What SGLang does when it sees that a load of its own has finished."""
        load = self._loads.pop(job.number, None)
        if load is None:
            return
        held = self.cache.ongoing_load_back.pop(load.anchor)
        self.cache.dec_lock_ref(load.anchor, held.lock_params)
        self.cache.dec_host_lock_ref(load.anchor, held.host_lock_params)
        self.cache.tree_core.finish_load_back(load.anchor)


class _Counts(dict):
    """What SGLang counts evictions in, when nobody asks."""

    def __missing__(self, key: Any) -> int:
        return 0
