"""Counters of this process that any thread may raise and one reader empties."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping


class Counts:
    """Numbers by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Count ``count`` more."""
        with self._lock:
            self._counts[name] += count

    def add_all(self, counts: Mapping[str, int]) -> None:
        """Count what another process has counted."""
        with self._lock:
            self._counts.update(counts)

    def take(self) -> dict[str, int]:
        """What came in since the last call."""
        with self._lock:
            taken, self._counts = dict(self._counts), Counter()
        return taken
