"""A port that is still free when a server gets to it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sglang_vericache.demo import port
from sglang_vericache.demo.port import free_port

HOST = "127.0.0.1"


def test_no_connection_is_given_it():
    """Catches a port that the system may hand out while the server still imports."""
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(limits.read_text().split()[0]) if limits.exists() else 32768
    assert all(1024 < free_port(HOST) < min(lowest, 22_000) for _ in range(20))


def test_one_in_use_is_passed_over(monkeypatch):
    with socket.socket() as taken, socket.socket() as other:
        for listening in (taken, other):
            listening.bind((HOST, 0))
            listening.listen()
        ports = [listening.getsockname()[1] for listening in (taken, other)]
        free = free_port(HOST)
        monkeypatch.setattr(port, "_PORTS", range(min(ports), max(ports) + 1))
        monkeypatch.setattr(port.random.SystemRandom, "sample", lambda *_: [*ports, free])
        assert free_port(HOST) == free
        monkeypatch.setattr(port.random.SystemRandom, "sample", lambda *_: ports)
        with pytest.raises(OSError, match="are taken"):
            free_port(HOST)
