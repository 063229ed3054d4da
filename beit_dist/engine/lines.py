"""Files of lines that grow with a run, and outlive a disk that is full for a while."""

from __future__ import annotations

import logging
from io import FileIO
from pathlib import Path

from beit_dist.storage.durable import sync

_log = logging.getLogger(__name__)


class Lines:
    """Lines added to the end of a file.

    What the disk refuses stays in memory and is written with the next lines: a run trains on while it cannot be
    recorded, until as many checkpoints have failed as the recipe allows.

    Args:
        path: the file; it is made. When another process replaces it, the lines go to the old one, into nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = FileIO(path, "a")
        self._left = b""
        self._fault = ""

    @property
    def fault(self) -> str:
        """Why lines could not be written at the last ``flush``; empty when none is missing."""
        return self._fault

    def add(self, line: str) -> None:
        """Add a line, without its end, at the next ``flush``."""
        self._left += line.encode() + b"\n"

    def flush(self, durable: bool = False) -> None:
        """Hand the lines to the system; ``durable``, to the disk too, so that they survive a power loss."""
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) or 0 :]  # a full disk takes a part
            if durable:
                sync(self._file.fileno())
        except OSError as error:
            if not self._fault:
                _log.warning("%s cannot be written; its lines are kept in memory: %s", self.path, error.strerror)
            self._fault = f"{self.path.name} cannot be written: {error.strerror}"
        else:
            self._fault = ""

    def close(self) -> None:
        """Write what can be written, and close the file."""
        self.flush()
        self._file.close()
