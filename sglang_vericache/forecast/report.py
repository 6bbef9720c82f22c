"""The `plan` command: what a model gains on a card."""

from __future__ import annotations

import argparse
import sys

from sglang_vericache.config import VeriCacheConfigError
from sglang_vericache.forecast.costs import beside_draft_pool, costs_of, pool_tokens
from sglang_vericache.forecast.hardware import CARDS, card_named
from sglang_vericache.forecast.load import Draft, Load, Outcome
from sglang_vericache.forecast.shape import KNOWN, shape_of
from sglang_vericache.forecast.simulate import (
    simulate_attached,
    simulate_offload,
    simulate_plain,
)

HELP = "foresee what drafting and offloading gain for a model on a card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    integer, fraction = int, float
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|FOLDER",
        help=f"a folder with a config.json, or one of: {', '.join(KNOWN)}",
    )
    parser.add_argument("--gpu", required=True, help=f"one of: {', '.join(CARDS)}")
    for option, kind, default, help in (
        ("--requests", integer, 24, "requests that come at once"),
        ("--context", integer, 32768, "tokens of each prompt"),
        ("--output", integer, 512, "tokens of each answer"),
        ("--prefixes", integer, 0, "groups of requests that share the beginning of their prompt"),
        ("--shared", integer, 0, "tokens that a group shares"),
        ("--pool", integer, 0, "tokens of the KV pool; 0 for what the card has room for"),
        ("--horizon", integer, Draft.horizon, "tokens drafted in a round"),
        ("--tokens-per-round", fraction, 10.0, "tokens that a round brings, from your metrics"),
        ("--kept", fraction, 0.1, "share of the KV bytes that a draft reads"),
    ):
        parser.add_argument(
            option, type=kind, default=default, metavar="N", help=f"{help} (default {default})"
        )


def run(
    model: str,
    gpu: str,
    requests: int,
    context: int,
    output: int,
    prefixes: int,
    shared: int,
    pool: int,
    horizon: int,
    tokens_per_round: float,
    kept: float,
) -> int:
    """Print the table; exit code 2 when the question makes no sense."""
    try:
        shape, card = shape_of(model), card_named(gpu)
        load = Load(requests, context, output, prefixes, shared)
        draft = Draft(horizon, tokens_per_round, kept)
        _check(load, draft, pool)
        memory = pool or pool_tokens(shape, card)
        capacity = beside_draft_pool(memory)
        if capacity < context + output + 2 * (draft.deepest + 1):
            raise VeriCacheConfigError(
                f"--context {context} does not fit: beside the weights this card has room for "
                f"{capacity} tokens. Give a smaller context, or a larger --gpu or --pool."
            )
    except VeriCacheConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{shape.name} on {card.name} ({card.source}): KV memory for {memory} tokens, "
        f"{capacity} beside the draft pool; {requests} requests of {context} + {output}."
    )
    plain = simulate_plain(shape, card, load, memory)
    attached = simulate_attached(shape, card, load, capacity, draft)
    offload = simulate_offload(shape, card, load, capacity, draft)
    lines: list[tuple[str, ...]] = [("", "tokens/s", "gain", "together", "link", "slowest")]
    for name, outcome in (("plain", plain), ("drafting", attached), ("offloading", offload)):
        lines.append((name, *_row(outcome, plain)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)).rstrip())
    costs = costs_of(shape, card, load, capacity, draft)
    print(
        f"A round of a request that stays takes {costs.round_s * 1e3:.0f} ms; a path arrives in "
        f"{costs.fetch_s * 1e3:.0f} ms. Rotation {'pays' if costs.pays else 'does not pay'}."
    )
    print("Arithmetic by bytes and launches, not a measurement.")
    return 0


def _row(outcome: Outcome, plain: Outcome) -> tuple[str, ...]:
    return (
        f"{outcome.tokens_per_s:.0f}",
        f"{outcome.tokens_per_s / plain.tokens_per_s:.2f}x",
        str(outcome.together),
        f"{outcome.link_use:.0%}",
        f"{outcome.slowest:.2f}x",
    )


def _check(load: Load, draft: Draft, pool: int) -> None:
    for option, value, least in (
        ("--requests", load.requests, 1),
        ("--context", load.context, 1),
        ("--output", load.output, 1),
        ("--prefixes", load.prefixes, 0),
        ("--shared", load.shared, 0),
        ("--pool", pool, 0),
        ("--horizon", draft.horizon, 1),
        ("--tokens-per-round", draft.yields, 1),
    ):
        if value < least:
            raise VeriCacheConfigError(f"{option} {value} is too small: at least {least}.")
    if not 0 < draft.kept <= 1:
        raise VeriCacheConfigError(f"--kept {draft.kept} is outside (0, 1].")
    if draft.yields > draft.horizon + 1:
        raise VeriCacheConfigError(
            f"--tokens-per-round {draft.yields} is more than a round of --horizon {draft.horizon} "
            f"can bring: at most {draft.horizon + 1}."
        )
    if bool(load.prefixes) != bool(load.shared) or load.shared > load.context:
        raise VeriCacheConfigError(
            "--prefixes and --shared go together, and --shared is at most --context."
        )
