"""Whether processes run; an ended orphan stays a zombie where nothing reaps it, as in many containers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import psutil


def living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def left_of(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until all have ended; those that have not after so many seconds."""
    left, deadline = living(processes), time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = living(left)
    return left


def members(group: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                found.append(process)
        except ProcessLookupError:
            pass
    return living(found)
