"""Output that nobody reads any more ends no run: Ctrl-C ends the ``tee`` behind it before it has saved."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any, TextIO, cast

one_line = threading.Lock()
"""Held while a line is written that another thread must not tear."""


class Unread:
    """A text stream that drops what its other end does not take: a pipe without a reader, a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say_above(text: str) -> None:
    """Say something from any thread, in a line of its own; a line of progress comes back below it."""
    held = one_line.acquire(timeout=1)  # whoever holds it may wait for a terminal that was stopped
    try:
        print(f"\r\033[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
    finally:
        if held:
            one_line.release()


def go_on_unread() -> None:
    """Have this process outlive the readers of its output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unread):
            setattr(sys, name, cast(TextIO, Unread(stream)))
