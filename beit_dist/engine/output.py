"""Output that nobody reads any more ends no run: Ctrl-C ends the ``tee`` behind it before it has saved."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO, cast


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


def go_on_unread() -> None:
    """Have this process outlive the readers of its output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unread):
            setattr(sys, name, cast(TextIO, Unread(stream)))
