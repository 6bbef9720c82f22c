"""Rows -> Markdown tables."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from benchmarks.registry import CASES, LEAST_OF_ATTACHED
from benchmarks.rows import RESULTS, Row


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last measured row of each (case, metric, model, flags, gpu), registered cases first;
    flags in another order are the same.

    Files only grow, so of two rows of one day the later line is the newer.
    """
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        flags = " ".join(sorted(flag_groups(row.flags)))
        key = (row.case, row.metric, row.model, flags, row.gpu)
        if key not in last or row.date >= last[key].date:
            last[key] = row
    return sorted(last.values(), key=lambda row: case_place(row.case))


def case_place(name: str) -> int:
    """Registered cases in their order, then the others."""
    return list(CASES).index(name) if name in CASES else len(CASES)


def flag_groups(flags: str) -> list[str]:
    """``["--a 1", "--b"]`` of ``"--a 1 --b"``: each flag with its values."""
    groups: list[str] = []
    for word in shlex.split(flags) if "--" in flags else [flags]:
        if word.startswith("--") or not groups:
            groups.append(word)
        else:
            groups[-1] += " " + word
    return groups


def common_flags(rows: Sequence[Row]) -> list[str]:
    """The flags that all rows share: said once. None for a single row, which shows its own."""
    if len(rows) < 2:
        return []
    groups = [flag_groups(row.flags) for row in rows]
    return [flag for flag in groups[0] if all(flag in other for other in groups)]


def own_flags(row: Row, common: Sequence[str]) -> str:
    return " ".join(flag for flag in flag_groups(row.flags) if flag not in common)


def case_cell(row: Row) -> str:
    """The case; whoever reads a figure with imposed acceptance must see that in its row."""
    if row.simulated_acceptance is None:
        return row.case
    return f"{row.case} (simulated acceptance: {row.simulated_acceptance})"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.4g}"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def rounds_cell(row: Row) -> str:
    return "-" if row.tokens_per_round is None else f"{row.tokens_per_round:.1f}"


# Of these less is better.
_SMALL_IS_GOOD = ("s", "ms", "in 1000 tokens")


def factor(row: Row) -> float | None:
    """How many times as good as the baseline."""
    if not row.baseline or not row.value:
        return None
    small_is_good = row.unit in _SMALL_IS_GOOD
    return row.baseline / row.value if small_is_good else row.value / row.baseline


def factor_cell(row: Row | None) -> str:
    gained = None if row is None else factor(row)
    return "-" if gained is None else f"{gained:.2f}"


def wanted_cell(row: Row) -> str:
    case = CASES.get(row.case)
    wanted = case.least_factor if case else None
    if row.metric == "queue_rate_of_attached":
        wanted = LEAST_OF_ATTACHED
    return "-" if wanted is None else f"{wanted:g}"


def markdown(columns: Sequence[str], lines: Sequence[dict[str, str]]) -> str:
    text = [columns, ["---"] * len(columns)]
    text += [[line.get(column, "-").replace("|", "\\|") for column in columns] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text)


def _serving_line(row: Row) -> dict[str, str]:
    case = CASES.get(row.case)
    return {
        "prompt tokens": str(case.context) if case else "-",
        "requests": str(case.requests or "-") if case else "-",
        "metric": row.metric.replace("_", " "),
        "without": number(row.baseline),
        "with": number(row.value),
        "unit": row.unit,
        "factor": factor_cell(row),
        "wanted": wanted_cell(row),
        "tokens a round": rounds_cell(row),
    }


def _plain_line(row: Row) -> dict[str, str]:
    return {
        "metric": row.metric.replace("_", " "),
        "value": number(row.value),
        "baseline": number(row.baseline),
        "unit": row.unit,
        "tokens a round": rounds_cell(row),
        "mismatches": _count(row.mismatches),
        "near ties": _count(row.near_ties),
    }


def table(name: str, rows: Sequence[Row]) -> str:
    """The table of results/``name``.jsonl, with what all of its rows share below it."""
    shown = newest(rows)
    if not shown:
        return "Nothing measured yet."
    common = common_flags(shown)
    line_of = _serving_line if name in ("serving", "offload") else _plain_line
    lines = []
    for row in shown:
        flags = own_flags(row, common)
        lines.append(
            {"case": case_cell(row)}
            | line_of(row)
            | {"flags": f"`{flags}`" if flags else "-", "model": row.model, "on": row.gpu}
            | {"commit": row.commit, "date": row.date}
        )
    # A column that no row fills says nothing.
    columns = [c for c in dict.fromkeys(c for line in lines for c in line) if _filled(c, lines)]
    made = markdown(columns, lines)
    if common:
        made += f"\n\nAll with `{' '.join(common)}`."
    return made + f"\n\n{_versions(shown)} [Rows](RESULTS/{name}.jsonl) with spreads and commands."


def _filled(column: str, lines: Sequence[dict[str, str]]) -> bool:
    return any(line.get(column, "-") != "-" for line in lines)


def _versions(rows: Sequence[Row]) -> str:
    return f"SGLang {', '.join(sorted({row.sglang for row in rows}))}."


def known_tables() -> list[str]:
    """Each results file is a table."""
    return sorted(path.stem for path in RESULTS.glob("*.jsonl"))
