"""TCP ports for servers and launchers that listen only later.

A port that the kernel gives out (``bind`` to 0) is from the range of outgoing connections: by the time a rank
listens on it, some client may have got it. These are from below that range.
"""

from __future__ import annotations

import contextlib
import random
import socket

_RANGE = range(10000, 32000)  # Linux gives outgoing connections 32768 and up (ip_local_port_range)


def free_ports(count: int) -> list[int]:
    """So many ports that nothing listens on."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_RANGE, 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no free ports between {_RANGE.start} and {_RANGE.stop}")
