"""Nodes of the radix tree on their way back from the host.

By the tree's book they are on the device already; their bytes are under way, or came back changed.
Until a load is settled a device lock and a host lock of its own hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sglang_vericache.loader.client import LoaderClient
from sglang_vericache.loader.job import Job
from sglang_vericache.tree.integrity import Integrity


@dataclass(frozen=True)
class Load:
    """
    Attributes:
        anchor: the deepest of its nodes.
        start: where they begin on the anchor's path.
    """

    job: Job
    anchor: int
    start: int


class Loads:
    """Those that are not settled.

    Args:
        cache: SGLang's radix cache with its host tier.
        integrity: says what came back changed; None believes the host.
    """

    def __init__(
        self, cache: Any, loader: LoaderClient, on_gpu: bool, integrity: Integrity | None
    ) -> None:
        self.cache, self.loader, self.integrity = cache, loader, integrity
        self._on_gpu = on_gpu
        self._loads: dict[int, Load] = {}
        self._arrived: set[int] = set()  # of those, numbers of the jobs that are done

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def tokens(self) -> int:
        return sum(load.job.tokens for load in self._loads.values())

    def on(self, nodes: set[int]) -> list[Load]:
        """Those that bring some of these nodes."""
        return [load for load in self._loads.values() if nodes & self._pending_nodes(load)]

    def is_under_way(self, job: Job) -> bool:
        """Whether its bytes have not arrived yet, changed or not."""
        return job.number in self._loads and job.number not in self._arrived

    def nodes(self, node: int) -> set[int]:
        """The path down to a node."""
        return {info.node_id for info in self._infos(node)}

    def mark(self) -> Any:
        """An event behind everything that the current stream has been given: on the forward
        stream, behind all that may still read what is evicted now."""
        if not self._on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def fence(self) -> Any:
        """As `mark` where another stream is the current one."""
        if not self._on_gpu:
            return None
        event = torch.cuda.Event()
        event.record(self.cache.cache_controller.load_fence_stream)
        return event

    # Beginning

    def begin(self, node: int, after: Any) -> bool:
        """Give the evicted nodes of a path slots and order the copy. False when the pool has no
        room for them."""
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

    def take_over_queued(self, after: Any) -> list[Load]:
        """Loads that an admission queued and SGLang did not start: for a prefill that was put off,
        and with checksums for every other. Their nodes look as if they were there."""
        queue, taken = self.cache.cache_controller.load_queue, []
        while queue:
            operation = queue.pop(0)
            (node,) = operation.node_ids
            end = sum(i.path_end - i.path_start for i in self._infos(node))
            taken.append(self._hand_over(operation, end - len(operation.host_indices), after))
        return taken

    def _hand_over(self, operation: Any, start: int, after: Any) -> Load:
        places = None
        if self.integrity is not None:
            places = self.integrity.places_of(operation.host_indices)
        events = (after, self.mark()) if self._on_gpu else ()
        job = self.loader.fetch(operation.host_indices, operation.device_indices, events, places)
        (node,) = operation.node_ids
        load = self._loads[job.number] = Load(job, node, start)
        return load

    # Ends

    def settle_arrived(self, timeout_s: float, wanted: set[int]) -> None:
        """What has arrived need not be kept by its load any longer, after waiting up to
        ``timeout_s`` for it.

        Args:
            wanted: numbers of jobs that somebody waits for.
        """
        for job in self.loader.poll(timeout_s):
            self._note_arrival(job)
        self._settle_sound()
        left = [self._loads[number] for number in self._arrived - wanted]
        # A node leaves the device after those below it.
        for load in sorted(left, key=lambda load: load.start, reverse=True):
            if self._held_by_load_only(load):
                self._take_back(load)

    def finish(self, load: Load, hurry: bool = False) -> bool:
        """Wait for a load, past those before it if need be; the current stream reads nothing
        before. Whether it brought what had been written: else it is to be mended."""
        self.loader.finish(load.job, hurry)
        if self._on_gpu and load.job.arrived is not None:
            torch.cuda.current_stream().wait_event(load.job.arrived)
        self._note_arrival(load.job)
        self._settle_sound()
        return not self._is_damaged(load.job)

    def mend(self, req: Any) -> None:
        """Before the path of a request is read: what came back changed is computed again.

        Precondition: the path is locked, everything on it has arrived, and the row is full.
        """
        if self.integrity is None:
            return
        damaged = [load for load in self._loads.values() if self._is_damaged(load.job)]
        for load in sorted(damaged, key=lambda load: load.start):
            path = self.cache.path_device_indices(req.last_node)
            self.integrity.mend(req, path, load.job)
        self._settle_sound()

    def call_off(self, job: Job) -> None:
        """Nobody is known to wait for a copy any more: withdraw it, and its nodes leave the
        device as they came. One that has begun, or that others read, just arrives."""
        load = self._loads.get(job.number)
        if load is not None and self._held_by_load_only(load) and self.loader.cancel(job):
            self._take_back(load)

    def drain(self) -> None:
        """Before the tree is reset: nothing may be copied afterwards."""
        self.loader.drain()
        for load in list(self._loads.values()):
            self._settle(load.job)
        if self.integrity is not None:
            self.integrity.forget()

    def _note_arrival(self, job: Job) -> None:
        if job.number in self._loads and job.number not in self._arrived:
            self._arrived.add(job.number)
            if self.integrity is not None:
                self.integrity.inspect(job)

    def _settle_sound(self) -> None:
        """Settle what has arrived as it was written, or was mended."""
        for load in sorted(self._loads.values(), key=lambda load: load.start):
            if load.job.number in self._arrived and self._is_sound(load):
                self._settle(load.job)

    def _is_sound(self, load: Load) -> bool:
        """Whether it may be read, down to its anchor. What lies below damage may have to leave the
        device again with it: nodes leave it after those below them."""
        if self.integrity is None:
            return True
        for other in self.on(self.nodes(load.anchor)):
            if other.job.number not in self._arrived:
                return False
            if self._is_damaged(other.job):
                path = self.cache.path_device_indices(load.anchor)
                if other is load or self.integrity.first_damaged(other.job, path) is not None:
                    return False
        return True

    def _settle(self, job: Job) -> None:
        """What SGLang does when it sees that a load of its own has finished."""
        load = self._loads.pop(job.number, None)
        self._arrived.discard(job.number)
        if load is None:
            return
        held = self.cache.ongoing_load_back.pop(load.anchor)
        self.cache.dec_lock_ref(load.anchor, held.lock_params)
        self.cache.dec_host_lock_ref(load.anchor, held.host_lock_params)
        self.cache.tree_core.finish_load_back(load.anchor)
        if self.integrity is not None:
            self.integrity.drop(job)

    def _take_back(self, load: Load) -> None:
        """The nodes of a load that only it holds leave the device as they came; of damaged ones,
        those that nobody can have read."""
        start = load.start
        if self._is_damaged(load.job) and self.integrity is not None:
            path = self.cache.path_device_indices(load.anchor)
            start = self.integrity.first_damaged(load.job, path)
        nodes = [info.node_id for info in self._infos(load.anchor) if info.path_end > start]
        self._settle(load.job)
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

    def _is_damaged(self, job: Job) -> bool:
        return self.integrity is not None and self.integrity.is_damaged(job)

    def _infos(self, node: int) -> Iterator[Any]:
        (infos,) = self.cache.tree_core.collect_path_info([node])
        return infos

    def _pending_nodes(self, load: Load) -> set[int]:
        """A split leaves the anchor its id and gives the part before it a new one."""
        return {i.node_id for i in self._infos(load.anchor) if i.path_start >= load.start}


class _Counts(dict):
    """What SGLang counts evictions in, when nobody asks."""

    def __missing__(self, key: Any) -> int:
        return 0
