"""Writes the tables of the documentation, and plots, out of the rows in benchmarks/results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``; NAME is a results file, or
``latest`` for the latest row of each serving case, offloading included.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.latest import latest_table
from benchmarks.rows import RESULTS, Row, read
from benchmarks.tables import known_tables, table

ROOT = Path(__file__).resolve().parent.parent
PLOTS = Path(__file__).parent / "plots"
LATEST = "latest"
SERVING = ("serving", "offload")
_OPEN, _CLOSE = re.compile(r"<!-- table: ([^ ]+) -->"), "<!-- /table -->"


class RenderError(ValueError):
    """A block that cannot be filled."""


def documents() -> list[Path]:
    return [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if path.exists()]


def fill(text: str, rows_of: Callable[[str], Sequence[Row]], known: Sequence[str]) -> str:
    """``text`` with every block's contents replaced.

    Args:
        rows_of: rows of a results file by its name.

    Raises:
        RenderError: an unknown name, or a block without an end.
    """
    parts, at = [], 0
    while found := _OPEN.search(text, at):
        name, end = found[1], text.find(_CLOSE, found.end())
        following = _OPEN.search(text, found.end())
        if end < 0 or (following and following.start() < end):
            raise RenderError(f"table {name} has no {_CLOSE}")
        if name == LATEST:
            made = latest_table([row for one in SERVING if one in known for row in rows_of(one)])
        elif name in known:
            made = table(name, rows_of(name))
        else:
            raise RenderError(f"no results for table {name}; there are {', '.join(known)}")
        parts += [text[at : found.end()], "\n", made, "\n", _CLOSE]
        at = end + len(_CLOSE)
    return "".join([*parts, text[at:]])


def rendered(document: Path) -> str:
    text = fill(
        document.read_text(encoding="utf-8"), lambda name: read(f"{name}.jsonl"), known_tables()
    )
    folder = Path(os.path.relpath(RESULTS, document.parent)).as_posix()
    return text.replace("](RESULTS/", f"]({folder}/")


def render_all(check: bool, plots: bool) -> int:
    """Exit code: 1 when ``check`` found a table that the rows no longer give, 2 for a bad block."""
    stale = []
    for document in documents():
        try:
            text = rendered(document)
        except RenderError as error:
            print(f"error: {document.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 2
        if text != document.read_text(encoding="utf-8"):
            stale.append(document)
            if not check:
                document.write_text(text, encoding="utf-8")
    for document in stale:
        print(f"{document.relative_to(ROOT)}: {'out of date' if check else 'written'}")
    if check:
        if stale:
            print("run: python -m benchmarks render")
        return 1 if stale else 0
    if plots:
        try:
            from benchmarks.plotting import draw
        except ImportError as error:
            print(f"error: plots need the bench extra ({error}), or --no-plots", file=sys.stderr)
            return 2
        for path in draw({name: read(f"{name}.jsonl") for name in known_tables()}, PLOTS):
            print(f"{path.relative_to(ROOT)}: written")
    return 0
