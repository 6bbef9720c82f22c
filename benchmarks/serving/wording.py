"""How figures are put into a row's note."""

from __future__ import annotations

from collections.abc import Sequence


def spread(values: Sequence[float]) -> str:
    digits = 0 if min(values) >= 100 else 2
    return f"({min(values):.{digits}f}-{max(values):.{digits}f})"


def servers(order: Sequence[str], together: bool) -> str:
    """How those of a comparison stood to each other.

    Args:
        order: names of the sides as their servers ran, or as they took turns.
    """
    how = "up at once, each case by turns" if together else "one after the other"
    return f"servers {how}: {', '.join(order)}"


def milliseconds(seconds: Sequence[float] | None) -> str:
    """Percentiles, or a dash where there are none."""
    return "-" if seconds is None else "/".join(f"{1000 * s:.1f}" for s in seconds)
