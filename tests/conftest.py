"""What holds for every test: one thread a process, and no two launchers beside each other."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator

import pytest

# Before anything imports torch: many short processes on few cores are slower, and sums differ, with more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside pytest-timeout's, so that waiting does not count
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Under xdist, run ``slow`` tests one after another: each starts ranks that fill two cores by themselves.

    A lock, since xdist 3.8's ``xdist_group`` has no effect with pytest 9.2 (it sets ``Item._nodeid``, which is
    no longer read).
    """
    if not (os.environ.get("PYTEST_XDIST_WORKER") and item.get_closest_marker("slow")):
        return (yield)
    with open(__file__, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return (yield)
