"""Imported by the fork server: a worker whose rank ends before the worker has begun says nothing.

What it was to be given is gone by then: semaphores that the rank had made, and the pipe to the rank. The fork
server would print a traceback for each worker of a run that is stopped while it starts.
"""

from __future__ import annotations

import sys
from types import TracebackType


def _unless_the_rank_is_gone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    semaphore = isinstance(error, FileNotFoundError) and error.filename is None
    if not (semaphore or isinstance(error, (EOFError, ConnectionError))):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _unless_the_rank_is_gone
