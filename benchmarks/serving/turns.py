"""Several servers up at once: each case is measured on one after the other, by turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Turns:
    """Nobody measures before all servers are up, and never two at a time.

    Args:
        names: of the sides, in the order of their turns.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._changed = threading.Condition()
        self._done = dict.fromkeys(names, 0)  # cases that each has been through
        self._ready: set[str] = set()
        self._gone: set[str] = set()

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """The next case of a side: after everybody before it has had theirs, and everybody behind
        it the one before."""
        with self._changed:
            self._ready.add(name)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._may_go(name))
        try:
            yield
        finally:
            with self._changed:
                self._done[name] += 1
                self._changed.notify_all()

    def leave(self, name: str) -> None:
        """It takes no more turns; nobody waits for it."""
        with self._changed:
            self._gone.add(name)
            self._changed.notify_all()

    def _may_go(self, name: str) -> bool:
        mine, at = self._done[name], self._names.index(name)
        for i, other in enumerate(self._names):
            if other == name or other in self._gone:
                continue
            if other not in self._ready or self._done[other] < mine + (i < at):
                return False
        return True
