"""Rows -> plots, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.latest import MAIN, latest
from benchmarks.registry import CASES, Case
from benchmarks.rows import Row
from benchmarks.tables import common_flags, factor, flag_groups, newest

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
                "serving": "times as good with the flag as without (line: wanted at least)",
                "acceptance": "tokens a round",
            }
            written += _save(_bars(bars, titles[name]), folder, name)
    points = _points(rows_of.get("serving", ()))
    if points:
        written += _save(_over_sizes(points), folder, "speed-over-context")
    return written


# A bar: label, length, and where a mark stands.
Bar = tuple[str, float, float | None]


def _factors(rows: Sequence[Row]) -> list[Bar]:
    found = {row.case for row in _latest(rows) if row.metric == MAIN}
    shown = [
        row
        for row in _latest(rows)
        if row.baseline
        and row.metric != "start_up"
        and (row.metric == MAIN or row.case not in found)
    ]
    common = common_flags(shown)
    bars = []
    for row in shown:
        case, gained = CASES.get(row.case), factor(row)
        if gained is not None:
            bars.append((_label(row, common), gained, case.least_factor if case else None))
    return bars


def _latest(rows: Sequence[Row]) -> list[Row]:
    """One of each case and metric; the tables have those of other flags and devices."""
    return [row for metrics in latest(rows).values() for row in metrics.values()]


def _rounds(rows: Sequence[Row]) -> list[Bar]:
    shown = [row for row in newest(rows) if row.metric == "tokens_per_round"]
    common = common_flags(shown)
    return [(_label(row, common), row.value, None) for row in shown]


def _label(row: Row, common: Sequence[str]) -> str:
    """Case, device and what is set of ours; the table names every flag."""
    metric = "" if row.metric == "decode_rate" else f" {row.metric.replace('_', ' ')}"
    own = [flag for flag in flag_groups(row.flags) if flag not in common]
    settings = [f.removeprefix("--vericache-") for f in own if f.startswith("--vericache-")]
    if "--" not in row.flags:  # a measure without a server
        settings = own
    lines = [f"{row.case}{metric}, {row.gpu}", " ".join(settings)]
    if row.simulated_acceptance is not None:
        lines.append(f"simulated acceptance: {row.simulated_acceptance}")
    return "\n".join(filter(None, lines))


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
    figure.suptitle(title, fontsize=10)
    return figure


@dataclass(frozen=True)
class Point:
    """The latest decode rate of a registered case."""

    case: Case
    gained: float
    simulated: bool
    model: str


def _points(rows: Sequence[Row]) -> list[Point]:
    points = []
    for row in _latest(rows):
        case, gained = CASES.get(row.case), factor(row)
        if row.metric == "decode_rate" and case is not None and gained is not None:
            points.append(Point(case, gained, row.simulated_acceptance is not None, row.model))
    return points


def _over_sizes(points: Sequence[Point]) -> Figure:
    """Factors of decode rate over both sizes of a case; hollow: simulated acceptance."""
    figure = Figure(figsize=(2 * WIDTH_INCHES / 1.5, 4.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    models = list(dict.fromkeys(point.model for point in points))
    for axes, label, size, other in (
        (panels[0], "tokens of context", _context, _requests),
        (panels[1], "requests at a time", _requests, _context),
    ):
        for color, model in enumerate(models):
            for point in (p for p in points if p.model == model):
                face = "none" if point.simulated else f"C{color}"
                axes.scatter(size(point), point.gained, edgecolor=f"C{color}", facecolor=face)
                axes.annotate(
                    f"{other(point)}",
                    (size(point), point.gained),
                    xytext=(5, 3),
                    textcoords="offset points",
                    fontsize=7,
                )
        axes.axhline(1.0, color="tab:gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
    panels[0].set_ylabel("decode rate with the flag / without")
    for color, model in enumerate(models):
        panels[0].scatter([], [], color=f"C{color}", label=model)
    panels[0].legend(fontsize=8)
    panels[0].set_title("at each point: requests at a time", fontsize=9)
    panels[1].set_title("at each point: tokens of context", fontsize=9)
    figure.suptitle("Decode rate by context and concurrency (hollow: simulated acceptance)")
    return figure


def _context(point: Point) -> int:
    return point.case.context


def _requests(point: Point) -> int:
    return point.case.requests


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
