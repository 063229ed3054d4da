"""Stop requests, by signal or by the clock: noted here, acted on at a step boundary all ranks agree on.

Python runs a signal's handler only between two of its own instructions, so a rank that is inside a collective
cannot act on one, and a rank that waits for its data cannot know of one that another rank got. Therefore a
thread is woken by the system itself (``signal.set_wakeup_fd``), and puts the request into the process group's
store, where ranks that wait for data look. This only lets them come to the boundary sooner. What happens there
is decided by the sum that every rank posts, and by nothing else: see ``Trainer._fetch``.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any, Protocol

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MAX_MINUTES = "max_minutes"
_KEY = "beit_dist/stop"


class Board(Protocol):
    """What is needed of ``torch.distributed.Store``: all ranks see what one of them puts there."""

    def set(self, key: str, value: str) -> None:
        """Leave a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there; returns at once."""


class StopRequest:
    """Notes SIGTERM, SIGINT, SIGUSR1 and SIGHUP while installed; a later second one ends the process at once.

    SIGHUP is that of a terminal which was closed. Where it is ignored, as under ``nohup``, it stays so.
    Schedulers deliver one stop more than once (SIGTERM to the step and to the batch script, within
    milliseconds), so a repetition counts as a second request only after ``grace`` seconds.

    Args:
        grace: seconds in which signals are one and the same request.
        max_minutes: ask to stop so long after this object was made; None never does.
        patience: seconds after a signal in which the ranks must have joined (``share``). While they join there
            is no boundary to stop at, and nothing to save either: then the process ends.
    """

    def __init__(self, grace: float = 5.0, max_minutes: float | None = None, patience: float = 10.0) -> None:
        self.name: str | None = None
        self._grace = grace
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._patience = patience
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._board: Board | None = None
        self._joined = threading.Event()
        self._ends: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop, by a signal or by its clock."""
        if self.name is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.name = MAX_MINUTES
            self._tell()
        return self.name is not None

    @property
    def known(self) -> bool:
        """Whether this rank was asked to stop, or another was; this asks the store, so not in every step."""
        if self.requested:
            return True
        with contextlib.suppress(RuntimeError):  # the store is gone: then so is rank 0, which others notice
            return self._board is not None and self._board.check([_KEY])
        return False

    def install(self) -> StopRequest:
        """Replace the handlers of this process; in the main thread only."""
        ends = os.pipe()
        for end in ends:
            os.set_blocking(end, end == ends[0])
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
        self._ends = ends
        self._thread = threading.Thread(target=self._listen, args=(ends[0],), name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def share(self, board: Board | None) -> None:
        """The ranks have joined: from now on requests are told to all of them through ``board``."""
        self._board = board
        self._joined.set()
        if self.name is not None:
            self._tell()

    def close(self, last: bool = False) -> None:
        """Put the previous handlers back.

        Args:
            last: ignore the signals instead: the process ends, and one that is repeated shall not change how.
        """
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if last else handler)
        self._previous.clear()
        self._joined.set()
        ends, self._ends = self._ends, None
        if ends is not None and self._thread is not None:
            signal.set_wakeup_fd(-1)
            os.close(ends[1])  # the thread reads the end of the pipe
            self._thread.join()
            os.close(ends[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, now
        elif now - self._since > self._grace:
            # Files are written under temporary names and committed last: ending here harms none.
            os._exit(128 + number)

    def _listen(self, end: int) -> None:
        """In the thread: one byte for each signal, written by the system even while Python cannot run handlers."""
        first: float | None = None
        name = ""
        while True:
            joining = first is not None and not self._joined.is_set()
            limits = [(first or 0.0) + self._patience] if joining else []
            if self.name is None and self._deadline is not None:
                limits.append(self._deadline)
            left = max(0.0, min(limits) - time.monotonic()) if limits else None
            if not select.select([end], [], [], left)[0]:
                if joining and not self._joined.is_set() and time.monotonic() >= limits[0]:
                    text = f"{name} on {socket.gethostname()} while the ranks join: ended, nothing was done"
                    print(text, file=sys.stderr, flush=True)
                    os._exit(128 + signal.Signals[name])
                self.requested  # noqa: B018  # the clock: the main thread may be where it cannot look
                continue
            numbers = os.read(end, 64)
            if not numbers:
                return
            stops = [number for number in numbers if number in STOP_SIGNALS]
            if stops and first is None:
                first, name = time.monotonic(), signal.Signals(stops[0]).name
            elif stops and time.monotonic() - (first or 0.0) > self._grace:
                os._exit(128 + stops[-1])  # as _note would, if the main thread could run it
            if stops:
                self._tell()

    def _tell(self) -> None:
        board = self._board
        if board is not None:
            with contextlib.suppress(RuntimeError):
                board.set(_KEY, "1")
