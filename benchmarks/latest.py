"""The latest rows of each serving case, a line a case: what a reader looks at first."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.registry import CASES
from benchmarks.rows import Row
from benchmarks.tables import (
    case_cell,
    case_place,
    factor_cell,
    markdown,
    number,
    rounds_cell,
    wanted_cell,
)

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
    return dict(sorted(found.items(), key=lambda item: case_place(item[0])))


def latest_table(rows: Sequence[Row]) -> str:
    lines = []
    for metrics in latest(rows).values():
        if MAIN in metrics:
            lines.append(_line(metrics[MAIN], case_cell(metrics[MAIN]), metrics))
        else:
            for metric, row in metrics.items():
                lines.append(_line(row, f"{case_cell(row)}, {metric.replace('_', ' ')}", {}))
    if not lines:
        return "Nothing measured yet."
    return markdown(list(lines[0]), lines)


def _line(row: Row, name: str, metrics: dict[str, Row]) -> dict[str, str]:
    case = CASES.get(row.case)
    beside = {title: factor_cell(metrics.get(metric)) for metric, title in BESIDE.items()}
    return {
        "case": name,
        "prompt tokens x requests": f"{case.context} x {case.requests or 'arrivals'}"
        if case
        else "-",
        "without": f"{number(row.baseline)} {row.unit}",
        "with": f"{number(row.value)} {row.unit}",
        "factor": factor_cell(row),
        "wanted": wanted_cell(row),
        **beside,
        "tokens a round": rounds_cell(row),
        "on": row.gpu,
        "commit": row.commit[:7],
    }
