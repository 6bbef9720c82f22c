"""What a side is doing, and how long each part of it took: device time is planned by these."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

SERVER = "server"  # the parts that belong to no case
Spent = dict[str, dict[str, float]]


class Progress:
    """``with`` shows it: a bar of cases on a terminal, elsewhere a line for each part.

    Args:
        side: whose cases they are.
        cases: how many.

    Attributes:
        spent: seconds by case, SERVER among them, and part; parts of one name are added up.
    """

    def __init__(self, side: str, cases: int) -> None:
        self.side, self.spent = side, Spent()
        self._cases = cases
        self._part: tuple[str, str] | None = None

    def __enter__(self) -> Progress:
        self._began = self._since = time.perf_counter()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self._cases, desc=self.side, unit="case", disable=not terminal)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._bar.close()

    def begin(self, case: str, what: str) -> None:
        """A part that lasts until the next begins, or `end`."""
        again = self._part == (case, what)
        self.end()
        self._part, self._since = (case, what), time.perf_counter()
        if self._bar.disable and not again:
            print(f"[{self._since - self._began:6.1f} s] {self.side}: {case}, {what}", flush=True)
        self._bar.set_description(f"{self.side}: {case}, {what}")

    def end(self) -> None:
        if self._part is not None:
            case, what = self._part
            parts = self.spent.setdefault(case, {})
            parts[what] = parts.get(what, 0.0) + time.perf_counter() - self._since
        self._part = None

    def case_done(self) -> None:
        self.end()
        self._bar.update()

    def say(self, text: str) -> None:
        """Beside the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def spent_lines(record: Mapping[str, Any]) -> list[str]:
    """Of one start of a server: how long it took, and each case in it."""
    spent: Spent = record.get("spent_s", {})
    total = sum(sum(parts.values()) for parts in spent.values())
    lines = [f"{record['side']['name']}: {total:.0f} s"] if spent else []
    for case, parts in spent.items():
        told = ", ".join(f"{what} {seconds:.1f}" for what, seconds in parts.items())
        lines.append(f"  {case} {sum(parts.values()):.1f} s: {told}")
    return lines
