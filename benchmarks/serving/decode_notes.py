"""What a row of decoding says beside its rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.serving.figures import LEAST_STEADY_S, LEAST_STEADY_TOKENS, Divergence
from benchmarks.serving.lone_first_tokens import first_token_notes
from benchmarks.serving.measure import median_run
from benchmarks.serving.rates import ALL_RUN, CLOSED, LONE, WHOLE, Basis
from benchmarks.serving.selection import MOST_REPETITION
from benchmarks.serving.wording import milliseconds

Record = dict[str, Any]


def decode_notes(basis: Basis, ours: Sequence[Record], plain: Sequence[Record]) -> Iterator[str]:
    """After what was timed and how often.

    Args:
        ours: figures of all starts of that side.
        plain: those of the baseline.
    """
    mine, theirs = basis.last(ours), basis.last(plain)
    run, other = basis.run(mine), basis.run(theirs)
    if basis is CLOSED:
        yield _running(run, other)
    else:
        yield from _fixed_set(basis, mine, theirs)
        yield f"first run of it, draft views to build, {_ratio(mine, theirs, 'first_whole')}"
    since = ", from sending all of it," if basis in (ALL_RUN, WHOLE) and "sent" in mine else ""
    yield f"first token{since} {_times(run, other, 'first_token_s')}"
    yield f"between tokens as they arrive {_times(run, other, 'between_tokens_s')}"
    yield (
        "between tokens, those that came together sharing their time, "
        f"{_times(run, other, 'between_tokens_even_s')}"
    )
    yield from first_token_notes(ours, plain)
    yield from _outputs(mine, theirs)


def _ratio(mine: Record, theirs: Record, key: str) -> str:
    return f"{mine[key]:.0f} to {theirs[key]:.0f} tokens/s ({mine[key] / theirs[key]:.2f}x)"


def _times(mine: Record, theirs: Record, key: str) -> str:
    """Both percentiles in milliseconds."""
    one, other = (milliseconds(figures.get(key)) for figures in (mine, theirs))
    return f"p50/p99 {one} ms (baseline {other})"


def _running(one: Record, other: Record) -> str:
    return (
        f"past their first token on average {one['running']:.1f} requests (baseline "
        f"{other['running']:.1f}); {one['complete']} complete answers (baseline "
        f"{other['complete']})"
    )


def _fixed_set(basis: Basis, mine: Record, theirs: Record) -> Iterator[str]:
    """All requests once: how the median run went apart from the rate of the row."""
    one, other = median_run(mine), median_run(theirs)
    if basis is not WHOLE:
        yield f"fixed set from sending to the last token {_ratio(one, other, 'whole')}"
    if basis is LONE:
        return
    if "begun_within_s" in one and "begun_within_s" in other:
        yield (
            f"all began within {1000 * one['begun_within_s']:.0f} ms (baseline "
            f"{1000 * other['begun_within_s']:.0f})"
        )
    missing = [
        name for name, run in (("with the flag", one), ("without", other)) if run["steady"] is None
    ]
    if missing:
        yield (
            f"{' and '.join(missing)} no stretch of {LEAST_STEADY_S:g} s and {LEAST_STEADY_TOKENS} "
            "tokens in which all of it run"
        )
        return
    if basis is WHOLE:
        yield f"while all of it run {_ratio(one, other, 'steady')}"
    if "steady_s" in one and "steady_s" in other:
        yield (f"all of it run for {one['steady_s']:.2f} s (baseline {other['steady_s']:.2f})")


def _outputs(mine: Record, theirs: Record) -> Iterator[str]:
    if theirs["chosen"] is None:
        yield "random prompts"
        return
    count = len(theirs["repetition"])
    within = sum(share <= MOST_REPETITION for share in theirs["repetition"])
    ours = sum(share <= MOST_REPETITION for share in mine["repetition"])
    yield (
        f"{within} of {count} baseline outputs repeat at most {MOST_REPETITION:.0%} of their "
        f"8-grams (with the flag {ours}), of {theirs['chosen']['tried']} prompts tried"
    )
    parted = Divergence.between(mine["outputs"], theirs["outputs"])
    text = f"{parted.parted} of {parted.outputs} outputs part from the baseline's"
    if "itself" in theirs:
        own = Divergence(**theirs["itself"])
        text += f", of whose own {own.parted} of {own.outputs} at half the concurrency"
    yield text
