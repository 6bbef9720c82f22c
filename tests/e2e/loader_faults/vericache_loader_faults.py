"""An SGLang plugin that makes our loader thread fail on purpose, one way at a time.

The file named by VERICACHE_LOADER_FAULT holds the name of the fault, read at each use, so that one
server shows them all; the killed thread comes last.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import torch

NAMES = ("none", "late", "some fail", "all fail", "no messages", "overwritten", "killed")
# Less than the client's patience, but many scheduler steps.
LATE_S = 0.15


def activate() -> None:
    """Loaded in every process; only a scheduler that uses our flag runs a loader."""
    if not os.environ.get("_SGLANG_VERICACHE_ARMED"):
        return
    from sglang_vericache.loader import client, thread
    from sglang_vericache.loader.channel import Channel
    from sglang_vericache.loader.copy import PlainCopier

    file = Path(os.environ["VERICACHE_LOADER_FAULT"])
    submit, send = PlainCopier.submit, Channel.send
    client.PATIENCE_S = 0.3
    client.LoaderClient.__init__.__defaults__ = (None, 0.3, 4.0)
    count = 0

    def faulty_submit(copier, jobs) -> None:
        nonlocal count
        name = file.read_text()
        if not isinstance(threading.current_thread(), thread.LoaderThread):
            return submit(copier, jobs)
        count += 1
        if name == "overwritten":
            overwrite(copier, jobs[0])
        if name == "late":
            time.sleep(LATE_S)
        if name == "all fail" or (name == "some fail" and count % 2):
            raise RuntimeError("the link is cut")
        if name == "killed":
            raise SystemExit("killed")
        submit(copier, jobs)

    def overwrite(copier, job) -> None:
        """Somebody writes over a part of host memory: a token's keys of the first layer, one bit
        of the values of the last."""
        first, last = copier._layers[0][0], copier._layers[-1][0]
        rows = job.host_slots.tolist()
        first[rows[len(rows) // 8]] = 1e4
        last[rows[-1]].view(torch.uint8)[0, 3] ^= 64

    def faulty_send(channel, message) -> None:
        if file.read_text() != "no messages":
            send(channel, message)

    PlainCopier.submit, Channel.send = faulty_submit, faulty_send
