"""Copies on the host are not believed: what comes back changed is computed again.

A fetch that brought something else than what was written leaves its nodes locked and unread. The
first request that is about to read them has them computed again, into the very rows that they have
on the device, by a forward pass over its own tokens; the host copy is written anew from there. So
neither the tree nor the request's place in the batch changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from sglang_vericache.loader.checksums import Checksums
from sglang_vericache.loader.job import Job

logger = logging.getLogger(__name__)

# Computes the KV of a request's tokens from ``start`` on into the ``[n]`` device rows given. All
# before them is there, and the request's row of the table says where.
Recompute = Callable[[Any, int, torch.Tensor], None]


class Integrity:
    """
    Attributes:
        recomputed: tokens computed again so far.
    """

    def __init__(self, checksums: Checksums, recompute: Recompute) -> None:
        self._checksums, self._recompute = checksums, recompute
        self._written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._damage: dict[int, torch.Tensor] = {}
        self.recomputed = 0

    # On the way to the host

    def note_write(self, node: int, host_slots: torch.Tensor, device_slots: torch.Tensor) -> None:
        """A node's rows are about to be copied."""
        self._written[node] = (host_slots.clone(), device_slots.clone())

    def seal(self, node: int) -> None:
        """That copy is acknowledged, and the node still locked: what it holds is final, and what
        the host should hold from now on."""
        slots = self._written.pop(node, None)
        if slots is not None:
            self._checksums.seal(*slots)

    def forget(self) -> None:
        """The tree is reset."""
        self._written.clear()
        self._damage.clear()

    # On the way back

    def places_of(self, host_slots: torch.Tensor) -> torch.Tensor:
        """For the check of a job: see `Job.places`."""
        return self._checksums.places_of(host_slots)

    def inspect(self, job: Job) -> None:
        """A job is done: what it brought changed is kept in mind until it is mended or dropped."""
        if job.changed:
            slots = job.device_slots.to(self._checksums.place)
            self._damage[job.number] = slots[self._checksums.find_changed(job.places, slots)]
            logger.error(
                "The host copy of %d tokens is not what was written there (fetch %d of %d tokens): "
                "it is not used, and they are computed again.",
                job.changed,
                job.number,
                job.tokens,
            )

    def is_damaged(self, job: Job) -> bool:
        return job.number in self._damage

    def first_damaged(self, job: Job, path: torch.Tensor) -> int | None:
        """Where on a path the first token lies that a damaged job brought changed.

        Args:
            path: ``[n]`` device rows.
        """
        found = torch.isin(path, self._damage[job.number]).nonzero().flatten()
        return int(found[0]) if len(found) else None

    def drop(self, job: Job) -> None:
        """Nobody reads what it brought: it left the device again."""
        self._damage.pop(job.number, None)

    def mend(self, req: Any, path: torch.Tensor, job: Job) -> None:
        """Compute again what ``job`` brought changed of a request's path.

        Args:
            path: ``[n]`` device rows of the path, which stand in the request's row as well.

        Precondition: everything else on the path before it is right.
        """
        damage = self._damage[job.number]
        changed = torch.isin(path, damage).nonzero().flatten().tolist()
        if not changed:
            return
        # One pass from the first to the last: what lies between costs less than more passes.
        start, end = changed[0], changed[-1] + 1
        rows = path[start:end]
        self._recompute(req, start, rows)
        self.recomputed += end - start
        slots = job.device_slots.to(rows.device)
        ours = torch.isin(slots, rows)
        self._checksums.rewrite(job.host_slots[ours.to(job.host_slots.device)], slots[ours])
        left = damage[~torch.isin(damage, rows)]
        if left.numel():
            self._damage[job.number] = left
        else:
            del self._damage[job.number]
