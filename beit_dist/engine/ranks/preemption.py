"""Stop requests, by signal or by the clock: noted here, acted on at a step boundary all ranks agree on.

Python runs a signal's handler only between two of its own instructions, so a rank that is inside a collective
cannot act on one, and a rank that waits for its data cannot know of one that another rank got. Therefore a
thread is woken by the system itself (``signal.set_wakeup_fd``), and puts the request into the process group's
store, where ranks that wait for data look. This only lets them come to the boundary sooner. What happens there
is decided by the sum that every rank posts, and by nothing else: see ``Trainer._fetch``.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from beit_dist.engine.output import say_above

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MAX_MINUTES = "max_minutes"
_KEY, _SAID, _RANK_0_JOINED = "beit_dist/stop", "beit_dist/stop-said", "beit_dist/stop-rank-0"
_OTHERS_SAY = 0.3
"""Seconds that a rank leaves the one before it for its word."""


def end_at_interrupt() -> None:
    """Until a start can be stopped in order (:class:`StopRequest`), Ctrl-C ends this process at once.

    ``KeyboardInterrupt`` comes out of the midst of an import as a traceback, or as another error.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once is enough
        with contextlib.suppress(OSError):
            os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    os._exit(128 + number)


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

    A request is acknowledged at once, by rank 0 if it has got one, else by the first that has.

    Args:
        rank: this rank.
        grace: seconds in which signals are one and the same request.
        max_minutes: ask to stop so long after this object was made; None never does.
        patience: seconds after a signal in which the ranks must have joined (``share``). While they join there
            is no boundary to stop at, and nothing to save either: then the process ends.

    Attributes:
        then: what a request that comes now leads to, in words; called in the thread that listens.
    """

    def __init__(
        self, rank: int = 0, grace: float = 5.0, max_minutes: float | None = None, patience: float = 10.0
    ) -> None:
        self.name: str | None = None
        self.then: Callable[[], str] = lambda: "stopping before the first step"
        self._rank, self._grace = rank, grace
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._patience = patience
        self._said = False
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
        if board is not None and self._rank == 0:
            for key in [_SAID] * self._said + [_RANK_0_JOINED]:
                board.set(key, "1")
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
        if self.name is None:
            self.name = signal.Signals(number).name

    def _listen(self, end: int) -> None:
        """In the thread: one byte for each signal, written by the system even while Python cannot run handlers."""
        first, unsaid, joined_by = math.inf, math.inf, math.inf  # when: the first signal, what is due
        name = ""
        while True:
            clock = self._deadline if self._deadline is not None and self.name is None else math.inf
            due = min(unsaid, math.inf if self._joined.is_set() else joined_by, clock)
            left = None if due == math.inf else max(0.0, due - time.monotonic())
            if select.select([end], [], [], left)[0]:
                numbers = os.read(end, 64)
                if not numbers:
                    return
                stops = [number for number in numbers if number in STOP_SIGNALS]
                if stops and first == math.inf:
                    first, name = time.monotonic(), signal.Signals(stops[0]).name
                    unsaid, joined_by = first + _OTHERS_SAY * min(self._rank, 20), first + self._patience
                elif stops and time.monotonic() - first > self._grace:
                    self._end_unsaved(stops[-1])
                if stops:
                    self._tell()
                continue
            now = time.monotonic()
            if now >= clock and self.requested:  # the main thread may be where it cannot look
                name, unsaid = MAX_MINUTES, now
            if now >= unsaid:
                unsaid = math.inf if self._acknowledged(name) else now + _OTHERS_SAY
            if now >= joined_by and not self._joined.is_set():
                say_above(
                    f"{name} on {socket.gethostname()} while the ranks were joining: stopped, nothing was done"
                )
                os._exit(128 + signal.Signals[name])

    def _acknowledged(self, name: str) -> bool:
        """Say what a request leads to, unless another rank has; False where that cannot be known yet."""
        self._said = True
        board = self._board
        if board is None and self._rank:
            return False
        with contextlib.suppress(RuntimeError):  # the store is gone
            if board is not None and self._rank:
                if not board.check([_RANK_0_JOINED]):  # and has left word whether it has said it
                    return False
                if board.check([_SAID]):
                    return True
            if board is not None:
                board.set(_SAID, "1")
        how = {MAX_MINUTES: "", signal.SIGINT.name: " Press Ctrl-C again after {:g} s to stop without saving."}
        again = how.get(name, " Send it again after {:g} s to stop without saving.").format(self._grace)
        say_above(f"{name}: {self.then()}.{again}")
        return True

    def _end_unsaved(self, number: int) -> None:
        """End at once: files are written under temporary names and committed last, so it harms none."""
        if self._rank == 0:
            say_above(f"{signal.Signals(number).name} again: stopped without saving")
        os._exit(128 + number)

    def _tell(self) -> None:
        board = self._board
        if board is not None:
            with contextlib.suppress(RuntimeError):
                board.set(_KEY, "1")
