"""A port for a server that binds it only after half a minute of imports."""

from __future__ import annotations

import random
import socket

# Below those that the system hands out to connections (32768 on Linux), and that SGLang picks for
# its own processes (22000 on): one of those may be taken before the server gets to it.
_PORTS = range(15_000, 22_000)
_ATTEMPTS = 64


def free_port(host: str) -> int:
    """One that nobody listens on.

    Raises:
        OSError: none was found.
    """
    for port in random.SystemRandom().sample(_PORTS, _ATTEMPTS):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"{_ATTEMPTS} ports from {_PORTS.start} to {_PORTS.stop - 1} are taken")
