"""The thread that copies."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from sglang_vericache.loader.channel import Channel
from sglang_vericache.loader.job import Job
from sglang_vericache.loader.messages import Cancel, Done, Failed, Fetch, Heartbeat, Stop

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.2
# While a copy is under way its event is looked at this often.
_LOOK_S = 0.0005


def _said(error: BaseException) -> str:
    """What was raised, and where: one line, as there may be one for every fetch."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(last.filename)}:{last.lineno}"
    return f"{type(error).__name__}: {error} ({where})"


class Copier(Protocol):
    """How bytes get from the host pool to the device pool."""

    def enter(self) -> None:
        """Called once in the thread that will copy."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start copying; sets each job's ``arrived`` where that happens later.

        Raises:
            Exception: nothing was started that still writes.
        """

    def arrived(self, job: Job) -> bool:
        """Whether the bytes are there; ``job.seconds`` is set then."""

    def bytes_of(self, job: Job) -> int: ...


class LoaderThread(threading.Thread):
    """Does the jobs that it is told, in that order.

    Args:
        jobs: by number, written by the scheduler only; a number that is not in it is skipped.
        batch: most jobs under way at a time.
    """

    def __init__(
        self, channel: Channel, jobs: Mapping[int, Job], copier: Copier, batch: int = 2
    ) -> None:
        super().__init__(name="vericache-loader", daemon=True)
        self._channel, self._jobs, self._copier, self._batch = channel, jobs, copier, batch
        self._ahead: deque[int] = deque()
        self._under_way: deque[Job] = deque()
        self._done = 0
        self._stopped = False
        self._beat_at = 0.0
        self.death: BaseException | None = None

    def run(self) -> None:
        try:
            self._copier.enter()
            while not self._stopped:
                self._beat()
                self._listen()
                self._report()
                self._start()
        except BaseException as error:
            self.death = error
            logger.error("the loader thread ends: %s", _said(error))
        finally:
            self._channel.close()

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beat_at >= HEARTBEAT_S:
            self._beat_at = now
            self._channel.send(Heartbeat(self._done))

    def _listen(self) -> None:
        busy = self._ahead or self._under_way
        message = self._channel.receive(_LOOK_S if busy else HEARTBEAT_S)
        while message is not None:
            if isinstance(message, Fetch):
                self._ahead.extend(message.jobs)
            elif isinstance(message, Cancel) and message.job in self._ahead:
                self._ahead.remove(message.job)
            elif isinstance(message, Stop):
                self._stopped = True
            message = self._channel.receive()

    def _report(self) -> None:
        while self._under_way and self._copier.arrived(self._under_way[0]):
            job = self._under_way.popleft()
            job.end()
            self._done += 1
            self._channel.send(Done(job.number, job.seconds, self._copier.bytes_of(job)))

    def _start(self) -> None:
        """A few jobs ahead of the link, so that it never idles; the others can be withdrawn."""
        if self._stopped:
            return
        begun: list[Job] = []
        while self._ahead and len(self._under_way) + len(begun) < self._batch:
            job = self._jobs.get(self._ahead.popleft())
            if job is not None and job.begin():
                begun.append(job)
        if not begun:
            return
        try:
            self._copier.submit(begun)
        except Exception as error:
            for job in begun:
                job.end(failed=True)
                self._channel.send(Failed(job.number, _said(error)))
            return
        self._under_way.extend(begun)
