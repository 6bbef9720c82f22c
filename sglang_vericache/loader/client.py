"""The scheduler's side of the loader."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from sglang_vericache.loader.channel import open_pair
from sglang_vericache.loader.job import Job, Stage
from sglang_vericache.loader.messages import Cancel, Done, Failed, Fetch, Stop
from sglang_vericache.loader.thread import HEARTBEAT_S, Copier, LoaderThread

logger = logging.getLogger(__name__)

# A job that nobody has begun after this long is copied by the scheduler itself: its message is
# lost, or the loader hangs. While those ordered before it keep the link busy it is in line.
PATIENCE_S = 2.0
# Without a sign of life for this long the loader is no longer asked.
SILENCE_S = 20 * HEARTBEAT_S


@dataclass
class LoaderCounters:
    """
    Attributes:
        fetches: jobs that arrived, whoever copied them.
        bytes, tokens, seconds: of those, by the device's clock.
        failed: copies by the loader that raised.
        late: jobs that the scheduler copied itself because the loader did not.
        cancelled: jobs withdrawn before they began.
        corrupt, corrupt_tokens: jobs that brought something else than what was written, and so
            many tokens of theirs.
    """

    fetches: int = 0
    bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failed: int = 0
    late: int = 0
    cancelled: int = 0
    corrupt: int = 0
    corrupt_tokens: int = 0


class LoaderClient:
    """Hands jobs to the loader thread and collects them; used by the scheduler thread only.

    A job that fails, is lost or is left over by a dead loader is copied here and now: that costs
    time, and whoever waits for the job never sees the difference.

    Args:
        copier: of the loader thread.
        fallback: of this thread.
        watch: see `open_pair`.
    """

    def __init__(
        self,
        copier: Copier,
        fallback: Copier,
        watch: str | None = None,
        patience_s: float = PATIENCE_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.counters = LoaderCounters()
        self._fallback, self._patience_s, self._silence_s = fallback, patience_s, silence_s
        fallback.enter()
        self._jobs: dict[int, Job] = {}
        self._next = 0
        self._channel, far = open_pair(watch)
        self._thread = LoaderThread(far, self._jobs, copier)
        self._heard_at = time.monotonic()
        self._busy_at = 0.0  # when a job was last seen under way
        self._given_up = False
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the loader thread does what it is told; once False it stays so."""
        if not self._given_up:
            silent = time.monotonic() - self._heard_at > self._silence_s
            if not self._thread.is_alive():
                self._give_up("it has ended")
            elif silent and self._oldest_wait() > self._silence_s:
                self._give_up(f"no sign of life for {self._silence_s:.0f} s")
        return not self._given_up

    @property
    def under_way(self) -> int:
        return len(self._jobs)

    def fetch(
        self,
        host_slots: Any,
        device_slots: Any,
        after: tuple[Any, ...] = (),
        places: Any = None,
    ) -> Job:
        """Order a copy; `poll` tells when it has arrived. The arguments are those of `Job`."""
        self._next += 1
        job = Job(self._next, host_slots, device_slots, after, places)
        self._jobs[job.number] = job
        self._channel.send(Fetch((job.number,)))
        return job

    def cancel(self, job: Job) -> bool:
        """Withdraw a job that has not begun; False when it will arrive."""
        if not job.withdraw():
            return False
        del self._jobs[job.number]
        self._channel.send(Cancel(job.number))
        self.counters.cancelled += 1
        return True

    def poll(self, timeout_s: float = 0.0) -> list[Job]:
        """Jobs that have arrived since the last call, after waiting up to ``timeout_s`` for
        one."""
        if timeout_s and not self._any_ended():
            self._hear(self._channel.receive(timeout_s))
        message = self._channel.receive()
        while message is not None:
            self._hear(message)
            message = self._channel.receive()
        self._rescue()
        # The job tells that it is done, not the message: that may be lost.
        done = [job for job in self._jobs.values() if job.stage is Stage.DONE]
        for job in done:
            self._count(job)
        return done

    def finish(self, job: Job, hurry: bool = False) -> None:
        """Wait until ``job`` has arrived; it is not returned by `poll` then.

        Args:
            hurry: copy it here and now, past those before it, unless the loader has begun it.
        """
        waited_from = time.monotonic()
        if hurry:
            self._copy(job)
        while job.stage is not Stage.DONE:
            self._hear(self._channel.receive(0.001))
            self._rescue(impatient=time.monotonic() - waited_from > self._patience_s)
        if job.number in self._jobs:
            self._count(job)

    def drain(self) -> list[Job]:
        """Withdraw what has not begun and wait for the rest; all jobs that were under way."""
        jobs = list(self._jobs.values())
        for job in [job for job in jobs if not self.cancel(job)]:
            self.finish(job)
        return jobs

    def close(self) -> None:
        """End the thread; nothing is copied afterwards."""
        self._channel.send(Stop())
        self._thread.join(5.0)
        self._channel.close()

    def _hear(self, message: Any) -> None:
        if message is None:
            return
        self._heard_at = time.monotonic()
        if isinstance(message, Failed):
            logger.warning("fetch %d failed and is repeated: %s", message.job, message.why)
        elif isinstance(message, Done):
            logger.debug("%s", message.describe())

    def _any_ended(self) -> bool:
        return any(job.stage in (Stage.DONE, Stage.FAILED) for job in self._jobs.values())

    def _oldest_wait(self) -> float:
        now = time.monotonic()
        return max((now - job.made_at for job in self._jobs.values()), default=0.0)

    def _give_up(self, why: str) -> None:
        self._given_up = True
        logger.error(
            "The loader thread of --vericache-offload is lost (%s): requests stay attached from "
            "now on.",
            why,
        )

    def _rescue(self, impatient: bool = False) -> None:
        """Copy what the loader will not."""
        now, lost = time.monotonic(), not self.alive
        begun = [job.number for job in self._jobs.values() if job.stage is Stage.COPYING]
        if begun:
            self._busy_at = now
        for job in list(self._jobs.values()):
            if job.stage is Stage.COPYING and not self._thread.is_alive():
                self._abandon(job)
            if job.stage is Stage.FAILED:
                self.counters.failed += 1
                job.retry()
                self._copy(job)
            elif job.stage is Stage.WAITING:
                # Jobs are begun in the order of their numbers.
                overtaken = max(begun, default=0) > job.number
                since = job.made_at if overtaken else max(job.made_at, self._busy_at)
                late = impatient or now - since > self._patience_s
                if (lost or late) and job.begin():
                    self.counters.late += 1
                    self._run(job)

    def _abandon(self, job: Job) -> None:
        """The thread died over a job: what it had started ends before anything else begins."""
        if job.arrived is not None:
            job.arrived.synchronize()
        job.end(failed=True)

    def _copy(self, job: Job) -> None:
        if job.begin():
            self._run(job)

    def _run(self, job: Job) -> None:
        job.arrived = None
        self._fallback.submit([job])
        while not self._fallback.arrived(job):
            time.sleep(0.0002)
        job.end()

    def _count(self, job: Job) -> None:
        del self._jobs[job.number]
        self.counters.fetches += 1
        self.counters.tokens += job.tokens
        self.counters.seconds += job.seconds
        self.counters.bytes += self._fallback.bytes_of(job)
        self.counters.corrupt += bool(job.changed)
        self.counters.corrupt_tokens += job.changed
