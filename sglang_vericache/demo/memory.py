"""Peak memory of a process tree."""

from __future__ import annotations

import threading

import psutil

SAMPLE_EVERY_S = 1.0


class PeakMemory:
    """Samples the resident memory of a process and its descendants until stopped.

    Pages shared between the processes count once for each: an upper bound.
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._root = psutil.Process(pid)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._now())
            if self._stopped.wait(SAMPLE_EVERY_S):
                return

    def _now(self) -> int:
        total = 0
        try:
            for process in (self._root, *self._root.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
        except psutil.NoSuchProcess:
            pass  # the server is gone: the peak stays
        return total
