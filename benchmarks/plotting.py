"""Rows -> plots, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.registry import CASES
from benchmarks.rows import Row
from benchmarks.tables import case_cell, common_flags, factor, newest, own_flags

BAR_INCHES, WIDTH_INCHES = 0.55, 8.0


def draw(rows_of: Mapping[str, Sequence[Row]], folder: Path) -> list[Path]:
    """Plots of those results that have one; the files written."""
    written = []
    for name, bars in (
        ("serving", _factors(rows_of.get("serving", ()))),
        ("acceptance", _rounds(rows_of.get("acceptance", ()))),
    ):
        if bars:
            titles = {
                "serving": "decode rate with the flag / without (line: wanted at least)",
                "acceptance": "tokens a round",
            }
            written += _save(_bars(bars, titles[name]), folder, name)
    return written


# A bar: label, length, and where a mark stands.
Bar = tuple[str, float, float | None]


def _factors(rows: Sequence[Row]) -> list[Bar]:
    shown = [row for row in newest(rows) if row.baseline]
    common = common_flags(shown)
    bars = []
    for row in shown:
        case, gained = CASES.get(row.case), factor(row)
        if gained is not None:
            bars.append((_label(row, common), gained, case.least_factor if case else None))
    return bars


def _rounds(rows: Sequence[Row]) -> list[Bar]:
    shown = [row for row in newest(rows) if row.metric == "tokens_per_round"]
    common = common_flags(shown)
    return [(_label(row, common), row.value, None) for row in shown]


def _label(row: Row, common: Sequence[str]) -> str:
    flags = own_flags(row, common).replace("--vericache-", "").replace("--", "")
    return f"{case_cell(row)}, {row.gpu}\n{flags}"


def _bars(bars: Sequence[Bar], title: str) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, 1.2 + BAR_INCHES * len(bars)), layout="constrained")
    axes = figure.subplots()
    places = range(len(bars))
    drawn = axes.barh(places, [length for _, length, _ in bars], color="tab:blue")
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    for place, (_, _, mark) in zip(places, bars, strict=True):
        if mark is not None:
            axes.vlines(mark, place - 0.4, place + 0.4, color="tab:red")
    axes.set_yticks(places, [label for label, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_title(title, fontsize=10)
    return figure


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    # Names inside an SVG are hashes; with a fixed salt the same rows give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "vericache"}):
        figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], metadata={"Software": None}, dpi=120)
    # Matplotlib ends lines of SVG paths with spaces, which git complains about.
    text = paths[0].read_text(encoding="utf-8")
    paths[0].write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", "utf-8")
    return paths
