"""One copy from the host to the device, and who may still begin or withdraw it. Pure."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Stage(Enum):
    """Of a job. WAITING is the only stage that both sides may leave."""

    WAITING = "waiting"
    COPYING = "copying"
    DONE = "done"
    FAILED = "failed"
    WITHDRAWN = "withdrawn"


@dataclass(eq=False)
class Job:
    """Host rows that become device rows.

    The device rows belong to the job from the moment it is made until it is done, failed or
    withdrawn: whoever made it neither reads nor frees them before.

    Attributes:
        host_slots, device_slots: ``[n]`` int64 rows of the host pool and of the device pool.
        after: events that the copy waits for: what the device rows held before may still be
            read up to there; the last of them: the slots themselves are there.
        places: ``[n]`` ``host_slots`` on the device of the checksums; None copies unchecked.
        arrived: event that the bytes have arrived, set by the copier; None where copies are
            synchronous.
        changed: tokens that arrived as something else than what was written; set when it is done.
    """

    number: int
    host_slots: Any
    device_slots: Any
    after: tuple[Any, ...] = ()
    places: Any = None
    arrived: Any = None
    changed: int = 0
    seconds: float = 0.0
    made_at: float = field(default_factory=time.monotonic)
    _stage: Stage = Stage.WAITING
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def tokens(self) -> int:
        return len(self.host_slots)

    def begin(self) -> bool:
        """For the one who copies; False when the job was begun or withdrawn already."""
        return self._move(Stage.WAITING, Stage.COPYING)

    def withdraw(self) -> bool:
        """Nobody will begin this job; False when somebody has."""
        return self._move(Stage.WAITING, Stage.WITHDRAWN)

    def end(self, failed: bool = False) -> None:
        """By the one who began it."""
        if not self._move(Stage.COPYING, Stage.FAILED if failed else Stage.DONE):
            raise AssertionError(f"job {self.number} ends while {self._stage.value}")

    def retry(self) -> bool:
        """Let a job that failed be begun again."""
        return self._move(Stage.FAILED, Stage.WAITING)

    def _move(self, before: Stage, after: Stage) -> bool:
        with self._lock:
            if self._stage is not before:
                return False
            self._stage = after
            return True
