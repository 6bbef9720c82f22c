"""What the scheduler and the loader thread tell each other. Pure.

Messages are signals only: what is to be copied, and whether it may still be, lies in the `Job`
that both sides hold. So a lost message costs time, never tokens.
"""

from __future__ import annotations

import msgspec


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Scheduler to loader: copy these jobs, in this order."""

    jobs: tuple[int, ...]

    def describe(self) -> str:
        return f"fetch {', '.join(map(str, self.jobs))}"


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Scheduler to loader: nobody wants this job any more; it was withdrawn before it began."""

    job: int

    def describe(self) -> str:
        return f"cancel {self.job}"


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Scheduler to loader: end after the copy under way."""

    def describe(self) -> str:
        return "stop"


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Loader to scheduler: the bytes have arrived.

    Attributes:
        seconds: that the copy took on the device, or on the host where that does not tell.
    """

    job: int
    seconds: float
    bytes: int

    def describe(self) -> str:
        return f"done {self.job}: {self.bytes} bytes in {self.seconds:.6f} s"


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Loader to scheduler: the copy raised; the destination holds anything."""

    job: int
    why: str

    def describe(self) -> str:
        return f"failed {self.job}: {self.why}"


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Loader to scheduler: alive, with so many jobs behind it."""

    jobs: int

    def describe(self) -> str:
        return f"heartbeat after {self.jobs} jobs"


Message = Fetch | Cancel | Stop | Done | Failed | Heartbeat

_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """Inverse of `encode`.

    Raises:
        msgspec.ValidationError, msgspec.DecodeError: not a message of ours.
    """
    return _DECODER.decode(data)
