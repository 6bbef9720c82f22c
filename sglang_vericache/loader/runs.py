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


def starts_of(*slots: torch.Tensor) -> list[int]:
    """Where runs begin that are consecutive in all of these.

    Args:
        slots: ``[n]`` int64 each, on the host.
    """
    count = slots[0].numel()
    if count == 0:
        return []
    broken = torch.zeros(count - 1, dtype=torch.bool)
    for each in slots:
        broken |= each.diff() != 1
    return [0, *(broken.nonzero().flatten() + 1).tolist()]


def runs_of(host_slots: torch.Tensor, device_slots: torch.Tensor) -> list[Run]:
    """The fewest runs that copy every row.

    Args:
        host_slots, device_slots: ``[n]`` int64 on the host.
    """
    edges = [*starts_of(host_slots, device_slots), host_slots.numel()]
    hosts, devices = host_slots.tolist(), device_slots.tolist()
    return [Run(hosts[a], devices[a], b - a) for a, b in itertools.pairwise(edges)]
