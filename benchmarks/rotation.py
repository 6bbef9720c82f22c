"""The rotation policy from 10 to 10,000 requests over cards and links: ``python -m
benchmarks.rotation``. Arithmetic by bytes with the server's own planner; no GPU, no row."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sglang_vericache.forecast.costs import beside_draft_pool, costs_of, pool_tokens
from sglang_vericache.forecast.hardware import CARDS, card_named
from sglang_vericache.forecast.load import Draft, Load
from sglang_vericache.forecast.shape import KNOWN, shape_of
from sglang_vericache.forecast.simulate import (
    simulate_attached,
    simulate_offload,
    simulate_plain,
)

# The cases that are measured on the card, with what is wanted of them at least.
MEASURED = {
    "24b-16k-pool48k": ("mistral-small-24b", Load(8, 16_384, 512), 48_000),
    "24b-32k-queue16": ("mistral-small-24b", Load(16, 32_768, 512), 175_000),
    "8b-32k-queue24": ("llama-3.1-8b", Load(24, 32_768, 512), 442_000),
    "8b-shared-16x4": ("llama-3.1-8b", Load(64, 33_792, 512, 16, 32_768), 442_000),
    "smol-7k7-pool8": ("smollm2-135m", Load(256, 7_700, 256), 32 * 7_700),
}
REQUESTS = (10, 100, 1_000, 10_000)
HEADER = ("case", "card", "requests", "plain", "drafting", "offloading", "link", "rotation")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rotation", description=__doc__)
    parser.add_argument("--tokens-per-round", type=float, default=11.0)
    parser.add_argument("--horizon", type=int, default=Draft.horizon)
    parser.add_argument("--kept", type=float, default=0.06)
    parser.add_argument("--most-requests", type=int, default=REQUESTS[-1])
    options = parser.parse_args(argv)
    draft = Draft(options.horizon, options.tokens_per_round, options.kept)
    lines: list[tuple[str, ...]] = [HEADER]
    for name, (model, load, pool) in MEASURED.items():
        lines.append(line(name, model, "h100", load, pool, draft))
    for card in CARDS:
        for model in KNOWN:
            for requests in REQUESTS:
                load = Load(requests, 8_192, 128)
                pool = pool_tokens(shape_of(model), card_named(card))
                if requests <= options.most_requests and pool > 2 * (8_192 + 256):
                    lines.append(line(model, model, card, load, pool, draft))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    return 0


def line(
    name: str, model: str, card_name: str, load: Load, pool: int | None, draft: Draft
) -> tuple[str, ...]:
    shape, card = shape_of(model), card_named(card_name)
    memory = pool or pool_tokens(shape, card)
    capacity = beside_draft_pool(memory)
    plain = simulate_plain(shape, card, load, memory)
    attached = simulate_attached(shape, card, load, capacity, draft)
    offload = simulate_offload(shape, card, load, capacity, draft)
    gains = [f"{x.tokens_per_s / plain.tokens_per_s:.2f}x" for x in (attached, offload)]
    pays = "pays" if costs_of(shape, card, load, capacity, draft).pays else "-"
    rate = f"{plain.tokens_per_s:.0f}/s"
    return (name, card.name, str(load.requests), rate, *gains, f"{offload.link_use:.0%}", pays)


if __name__ == "__main__":
    raise SystemExit(main())
