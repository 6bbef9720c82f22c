"""What the scheduler and the loader thread tell each other, and the way it goes."""

from __future__ import annotations

import time

import msgspec
import pytest
import zmq
from loader_fakes import wait_for

from sglang_vericache.loader.channel import open_pair
from sglang_vericache.loader.messages import (
    Cancel,
    Done,
    Failed,
    Fetch,
    Heartbeat,
    Stop,
    decode,
    encode,
)

MESSAGES = [
    Fetch((3, 1, 2)),
    Cancel(7),
    Stop(),
    Done(4, 0.25, 1 << 40),
    Failed(5, "why: “so”"),
    Heartbeat(12),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_travel(message):
    """Catches a message that arrives as another, and one that can be changed on the way."""
    assert decode(encode(message)) == message and type(decode(encode(message))) is type(message)
    assert message.describe()
    for name in message.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(message, name, None)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1", encode(Cancel(1))[:-1]])
def test_what_is_no_message(data):
    with pytest.raises(msgspec.MsgspecError):
        decode(data)


def test_channel_goes_both_ways_and_times_out():
    near, far = open_pair()
    began = time.monotonic()
    assert near.receive() is None and near.receive(0.05) is None
    assert time.monotonic() - began >= 0.04
    for message in MESSAGES:
        near.send(message)
        far.send(message)
    assert [far.receive(1) for _ in MESSAGES] == MESSAGES
    assert [near.receive(1) for _ in MESSAGES] == MESSAGES
    near.close()
    far.send(Heartbeat(1))  # nobody is there: it must not wait
    far.close()


def test_another_process_can_watch(tmp_path):
    """By an address of the machine, both directions; a slow watcher holds nobody up."""
    address = f"ipc://{tmp_path}/loader"
    near, far = open_pair(address)
    context = zmq.Context()
    ears = []
    for end in ("scheduler", "loader"):
        ear = context.socket(zmq.SUB)
        ear.setsockopt(zmq.SUBSCRIBE, b"")
        ear.connect(f"{address}.{end}")
        ears.append(ear)
    heard: list = []

    def listen() -> bool:
        near.send(Fetch((1,)))
        far.send(Heartbeat(1))
        heard.extend(decode(ear.recv()) for ear in ears if ear.poll(10))
        return {Fetch((1,)), Heartbeat(1)} <= set(heard)

    wait_for(listen)
    for ear in ears:
        ear.close(linger=0)
    context.term()
    near.close()
    far.close()
