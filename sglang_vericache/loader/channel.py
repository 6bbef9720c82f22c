"""ZMQ between the scheduler and the loader thread, and to whoever watches."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import zmq

from sglang_vericache.loader.messages import Message, decode, encode

logger = logging.getLogger(__name__)
_numbers = itertools.count()


class Channel:
    """One end. Sending never waits: a message that finds no room is lost, which its receiver
    must survive anyway.

    Args:
        watch: address (``ipc://...``) at which another process may listen to what this end
            sends; None for none.
    """

    def __init__(self, socket: Any, watch: Any = None) -> None:
        self._socket, self._watch = socket, watch
        self.lost = 0

    def send(self, message: Message) -> None:
        data = encode(message)
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            self.lost += 1
        if self._watch is not None:
            self._watch.send(data, zmq.NOBLOCK)

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        """The next message, or None when none comes within ``timeout_s``."""
        if not self._socket.poll(int(timeout_s * 1000 + 0.999)):
            return None
        return decode(self._socket.recv())

    def close(self) -> None:
        self._socket.close(linger=0)
        if self._watch is not None:
            self._watch.close(linger=0)


# More messages than jobs can be under way, so that only a dead reader loses any.
_ROOM = 10_000


def open_pair(watch: str | None = None) -> tuple[Channel, Channel]:
    """The two ends of a channel inside this process.

    Args:
        watch: address for watchers of both directions; a subscriber gets every message.

    Raises:
        zmq.ZMQError: the address cannot be bound.
    """
    context: Any = zmq.Context.instance()
    address = f"inproc://vericache-loader-{next(_numbers)}"
    sockets = [context.socket(zmq.PAIR) for _ in range(2)]
    for socket in sockets:
        socket.setsockopt(zmq.SNDHWM, _ROOM)
        socket.setsockopt(zmq.RCVHWM, _ROOM)
    sockets[0].bind(address)
    sockets[1].connect(address)
    taps: list[Any] = [None, None]
    if watch is not None:
        # A socket belongs to one thread: each end publishes by its own, watchers connect to both.
        for end in range(2):
            taps[end] = context.socket(zmq.PUB)
            taps[end].bind(f"{watch}.{'scheduler' if end == 0 else 'loader'}")
        logger.info("loader messages can be watched at %s.scheduler and .loader", watch)
    return Channel(sockets[0], taps[0]), Channel(sockets[1], taps[1])
