"""What holds for every test: one thread a process, and no two launchers beside each other."""

from __future__ import annotations

import os

import pytest

# Before anything imports torch: many short processes on few cores are slower, and sums differ, with more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give all ``slow`` tests to one of xdist's processes: each starts ranks that fill the machine by themselves.

    At this hook, since xdist reads the groups before any later one of ours could set them.
    """
    if item.get_closest_marker("slow") and not item.get_closest_marker("xdist_group"):
        item.add_marker(pytest.mark.xdist_group("launcher"))
