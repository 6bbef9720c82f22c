"""Slots that follow one another: what one copy can take."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

# Slices shorter than this on average are not worth a copy each.
LEAST_RUN = 64


@dataclass(frozen=True)
class Run:
    """Consecutive host rows that become consecutive device rows."""

    host: int
    device: int
    count: int


def starts_of(*slots: torch.Tensor) -> torch.Tensor:
    """Where runs begin that are consecutive in all of these.

    Args:
        slots: ``[n]`` int64 each, on the host.

    Returns:
        ``[r]`` int64: one tensor, because there may be as many runs as slots, and making objects
        of them would keep Python's lock from the scheduler's thread for tens of milliseconds.
    """
    begins = torch.zeros(slots[0].numel(), dtype=torch.bool)
    begins[:1] = True
    for each in slots:
        begins[1:] |= each.diff() != 1
    return begins.nonzero().flatten()


def runs_of(
    host_slots: torch.Tensor, device_slots: torch.Tensor, starts: torch.Tensor
) -> list[Run]:
    """The runs that begin at ``starts``, for all slots.

    Args:
        host_slots, device_slots: ``[n]`` int64 on the host.
        starts: of both (`starts_of`).
    """
    edges = [*starts.tolist(), host_slots.numel()]
    hosts, devices = host_slots[starts].tolist(), device_slots[starts].tolist()
    counts = [b - a for a, b in itertools.pairwise(edges)]
    return [Run(*run) for run in zip(hosts, devices, counts, strict=True)]
