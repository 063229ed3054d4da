"""TCP ports for servers and launchers that listen only later.

A port that the kernel gives out (``bind`` to 0) is from the range of outgoing connections: by the time a rank
listens on it, some client may have got it. These are from below that range.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")  # by default 32768 and up; some hosts begin lower


def _range() -> range:
    try:
        first = int(_OUTGOING.read_text().split()[0])
    except (OSError, ValueError):
        first = 32768
    return range(10000, first if first >= 12000 else 32000)


def free_ports(count: int) -> list[int]:
    """So many ports that nothing listens on."""
    found: list[int] = []
    ports = _range()
    for port in random.SystemRandom().sample(ports, 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no free ports between {ports.start} and {ports.stop}")
