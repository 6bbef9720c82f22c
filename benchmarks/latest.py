"""The latest rows of each serving case, a line a case: what a reader looks at first."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.registry import CASES
from benchmarks.rows import Row
from benchmarks.tables import case_cell, factor, number

# The rate that a case is about, and others of the same requests.
MAIN = "decode_rate"
BESIDE = {"fixed_set_rate": "whole set", "closed_loop_rate": "closed loop"}


def latest(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The last measured row of each metric of each case, whatever its flags and device were."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        metrics = found.setdefault(row.case, {})
        if row.metric not in metrics or row.date >= metrics[row.metric].date:
            metrics[row.metric] = row
    order = {name: i for i, name in enumerate(CASES)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def latest_table(rows: Sequence[Row]) -> str:
    lines = []
    for name, metrics in latest(rows).items():
        if MAIN in metrics:
            lines.append(_line(metrics[MAIN], case_cell(metrics[MAIN]), metrics))
        else:
            for metric, row in metrics.items():
                lines.append(_line(row, f"{name}, {metric.replace('_', ' ')}", {}))
    if not lines:
        return "Nothing measured yet."
    columns = list(lines[0])
    text = [columns, ["---"] * len(columns), *([line[c] for c in columns] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text)


def _line(row: Row, name: str, metrics: dict[str, Row]) -> dict[str, str]:
    case = CASES.get(row.case)
    wanted = case.least_factor if case else None
    beside = {title: _factor(metrics.get(metric)) for metric, title in BESIDE.items()}
    return {
        "case": name,
        "prompt tokens x requests": f"{case.context} x {case.requests or 'arrivals'}"
        if case
        else "-",
        "without": f"{number(row.baseline)} {row.unit}",
        "with": f"{number(row.value)} {row.unit}",
        "factor": _factor(row),
        "wanted": "-" if wanted is None else f"{wanted:g}",
        **beside,
        "tokens a round": "-" if row.tokens_per_round is None else f"{row.tokens_per_round:.1f}",
        "on": row.gpu,
        "commit": row.commit[:7],
    }


def _factor(row: Row | None) -> str:
    gained = None if row is None else factor(row)
    return "-" if gained is None else f"{gained:.2f}"
