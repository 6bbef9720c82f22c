"""Cards and their links. Rates are what copies reach, not what the data sheet says. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_vericache.config import VeriCacheConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """
    Attributes:
        memory_bytes: of the GPU.
        memory_rate: bytes/s that its own memory delivers.
        link_rate: bytes/s from pinned host memory.
        flops: operations/s that products of 16-bit matrices reach.
        source: where the rates are from.
    """

    name: str
    memory_bytes: int
    memory_rate: float
    link_rate: float
    flops: float
    source: str


# PCIe 4 and 5 at 16 lanes give about 25 and 55 GB/s to pinned copies. Memory rates that were not
# measured are 0.9 of the data sheet, as the H100's is; products reach 0.6 of it.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("h100", 80 * GIB, 3.03e12, 54.8e9, 600e12, "measured (memory, link)"),
        Card(
            "h200", 141 * GIB, 4.3e12, 45e9, 600e12, "measured (memory, link while the GPU works)"
        ),
        Card(
            "h100-pcie",
            80 * GIB,
            1.8e12,
            54.8e9,
            450e12,
            "data sheet x 0.9; link as measured on h100",
        ),
        Card("a100", 80 * GIB, 1.83e12, 25e9, 187e12, "data sheet x 0.9, PCIe 4"),
        Card("a100-40gb", 40 * GIB, 1.4e12, 25e9, 187e12, "data sheet x 0.9, PCIe 4"),
        Card("l40s", 48 * GIB, 0.78e12, 25e9, 109e12, "data sheet x 0.9, PCIe 4"),
        Card("rtx4090", 24 * GIB, 0.9e12, 25e9, 99e12, "data sheet x 0.9, PCIe 4"),
        Card("rtx5090", 32 * GIB, 1.6e12, 55e9, 126e12, "data sheet x 0.9, PCIe 5"),
        Card("gh200", 96 * GIB, 3.6e12, 375e9, 600e12, "data sheet x 0.9, NVLink-C2C"),
    )
}


def card_named(name: str) -> Card:
    """
    Raises:
        VeriCacheConfigError: unknown; the message lists the known ones.
    """
    card = CARDS.get(name.strip().lower())
    if card is None:
        raise VeriCacheConfigError(f"--gpu {name!r} is unknown. Accepted: {', '.join(CARDS)}.")
    return card
