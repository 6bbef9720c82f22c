"""The dashboard's panels, drawn from a Prometheus that scraped a server.

``python monitoring/picture.py --out FILE.png`` asks every query of the dashboard as Grafana would
and draws the answers in the dashboard's layout. It is no Grafana: it shows whether the queries find
what a server exports. Queries without an answer are listed, and the exit code is 1.
It needs matplotlib (``pip install '.[bench]'``).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHBOARD = Path(__file__).with_name("grafana") / "dashboards" / "vericache.json"
# Grafana: four scrapes, of 5 s here.
RATE_INTERVAL = "20s"
STEP_S = 2
GRID_COLUMNS, COLUMN_INCHES, ROW_INCHES = 24, 0.62, 0.36
FOOTER = (
    "Drawn by monitoring/picture.py from what Prometheus scraped; Grafana draws it differently."
)

Series = tuple[str, list[float], list[float]]


def filled(query: str) -> str:
    """With what Grafana puts in the place of variables where all models and servers are chosen."""
    query = query.replace("$__rate_interval", RATE_INTERVAL)
    return re.sub(r"\$(model|instance)\b", ".*", query)


def ask(url: str, query: str, minutes: float, legend: str) -> list[Series]:
    """Name, seconds from now (negative) and values of each series that the query finds."""
    end = time.time()
    options = {"query": filled(query), "start": end - 60 * minutes, "end": end, "step": STEP_S}
    response = requests.get(f"{url}/api/v1/query_range", params=options, timeout=30)
    answer = response.json()
    if answer["status"] != "success":
        raise ValueError(f"{query}: {answer['error']}")
    found = []
    for series in answer["data"]["result"]:
        points = [(float(at) - end, float(value)) for at, value in series["values"]]
        points = [(at, value) for at, value in points if math.isfinite(value)]
        if points:
            name = legend
            for label, text in series["metric"].items():
                name = name.replace("{{" + label + "}}", text)
            found.append((name, [at for at, _ in points], [value for _, value in points]))
    return found


def draw_panel(axes: Axes, panel: dict[str, Any], found: list[Series], minutes: float) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.set_title(panel["title"], fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    if panel["type"] == "stat":
        axes.axis("off")
        for name, _, values in found:
            shown = "On" if values[-1] else "Off"
            axes.text(0.5, 0.5, f"{shown}\n{name}", ha="center", va="center", fontsize=14)
        return
    axes.set_xlim(-60 * minutes, 0)
    axes.set_xlabel("seconds ago", fontsize=7)
    if panel["type"] == "heatmap":
        draw_heatmap(axes, found)
        return
    percent = unit == "percentunit"
    for name, at, values in found:
        axes.plot(at, [100 * value for value in values] if percent else values, label=name)
    axes.set_ylim(bottom=0)
    axes.set_ylabel({"percentunit": "%", "Bps": "bytes/s"}.get(unit, ""), fontsize=7)
    axes.grid(alpha=0.3)
    if found:
        axes.legend(fontsize=6, loc="best")


def draw_heatmap(axes: Axes, found: list[Series]) -> None:
    """Prometheus's buckets are cumulative; each row shows what its bucket adds."""
    buckets = sorted(((float(name), at, values) for name, at, values in found), key=lambda b: b[0])
    below: dict[float, float] = {}
    rows, columns, rates = [], [], []
    for row, (_, at, values) in enumerate(buckets):
        for when, value in zip(at, values, strict=True):
            added = value - below.get(when, 0.0)
            below[when] = value
            if added > 0:
                rows.append(row)
                columns.append(when)
                rates.append(added)
    dots = axes.scatter(columns, rows, c=rates, cmap="Blues", marker="s", s=16, vmin=0)
    axes.set_yticks(range(len(buckets)), [f"{bound:g}" for bound, _, _ in buckets])
    axes.set_ylabel("tokens, at most", fontsize=7)
    axes.figure.colorbar(dots, ax=axes, label="rounds/s").ax.tick_params(labelsize=6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--title", default="VeriCache")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    from matplotlib.figure import Figure

    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure((GRID_COLUMNS * COLUMN_INCHES, height * ROW_INCHES), layout="constrained")
    grid = figure.add_gridspec(height, GRID_COLUMNS)
    silent = []
    for panel in panels:
        place = panel["gridPos"]
        rows = slice(place["y"], place["y"] + place["h"])
        columns = slice(place["x"], place["x"] + place["w"])
        found = []
        for target in panel["targets"]:
            answers = ask(
                arguments.prometheus, target["expr"], arguments.minutes, target["legendFormat"]
            )
            if not answers:
                silent.append(f"{panel['title']}: {target['expr']}")
            found += answers
        draw_panel(figure.add_subplot(grid[rows, columns]), panel, found, arguments.minutes)
    figure.suptitle(arguments.title, fontsize=12)
    figure.supxlabel(FOOTER, fontsize=8)
    figure.savefig(arguments.out, dpi=110)
    for line in silent:
        print(f"no answer: {line}", file=sys.stderr)
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
