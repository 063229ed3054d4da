"""Where the ranks meet: the address of rank 0 and a port of its host, looked at before anyone waits there."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from beit_dist.config.environment import number
from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.ranks.launchers import LISTENING, on_one_host
from beit_dist.errors import ConfigError

LOOKUP_SECONDS = 30.0
"""How long the address is looked up: a pod's name is known only some seconds after the pod has started."""
_DEFAULT_PORT = 29500  # that of deepspeed and torchrun
_SILENT_SECONDS = 20.0
_NO_NAME = re.compile(r"[\s/]|^[^:]*:[0-9]*$")


class Meeting(NamedTuple):
    """Where the ranks meet."""

    address: str
    port: int
    listening: int | None = None
    """On rank 0, where ``--ranks`` has started it: the descriptor of a socket that listens there already."""


def meeting_point(ranks: Ranks, environment: Mapping[str, str] = os.environ) -> Meeting | None:
    """Where the ranks meet, by ``MASTER_ADDR`` and ``MASTER_PORT``; None for a rank that is alone.

    MPI launchers set neither. Where all their ranks are on one host, it is this one, at the port that
    ``deepspeed`` and ``torchrun`` would take.

    Raises:
        ConfigError: one of them is missing, or cannot be used.
    """
    if ranks.world == 1:
        return None
    address, port = environment.get("MASTER_ADDR", "").strip(), number(environment, "MASTER_PORT", 1, 65535)
    if on_one_host(environment):
        address, port = address or "127.0.0.1", port or _DEFAULT_PORT
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]
    if missing or port is None:
        raise ConfigError(
            ", ".join(missing),
            None,
            "the address of rank 0's host, and a free port there",
            "torchrun and deepspeed without --launcher set both. For srun, mpirun and deepspeed --launcher export "
            "them to all ranks (deepspeed reads them from ~/.deepspeed_env).",
        )
    if _NO_NAME.search(address):
        raise ConfigError("MASTER_ADDR", address, "a host's name or address, without port or protocol")
    return Meeting(address, port, number(environment, LISTENING))


def look_up(meeting: Meeting, seconds: float = LOOKUP_SECONDS) -> None:
    """Wait until the address can be looked up, but not long: torch would try until its own time-out.

    Raises:
        ConfigError: it cannot be; the same on all ranks.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(meeting.address, meeting.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end:
                reason = error.strerror if isinstance(error, OSError) else "not a host's name"
                refused = ConfigError(
                    "MASTER_ADDR",
                    meeting.address,
                    f"a name that can be looked up within {seconds:.0f} s ({reason})",
                    "Give the name or address of rank 0's host.",
                )
                if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                    refused.exit_code = 1  # a name server or a host that is not up yet: a retry may help
                raise refused from None
            time.sleep(min(1.0, seconds))
        else:
            return


@contextlib.contextmanager
def waiting_said(
    ranks: Ranks, meeting: Meeting | None, limit: str, seconds: float = _SILENT_SECONDS
) -> Iterator[None]:
    """Say what this rank waits for, if that takes long.

    Args:
        limit: how long it will wait, as a setting.
        seconds: how long it waits without a word.
    """
    if meeting is None:
        yield
        return
    text = (
        f"rank {ranks.rank} on {socket.gethostname()} is waiting for the other ranks at MASTER_ADDR:MASTER_PORT = "
        f"{meeting.address}:{meeting.port} ({limit})"
    )
    timer = threading.Timer(seconds, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
