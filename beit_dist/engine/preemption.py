"""Stop signals: a handler only notes the request; the loop acts on it at a step boundary all ranks agree on."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGUSR1 while installed; a second one, of another kind or later, ends at once.

    Schedulers deliver one stop more than once (SIGTERM to the step and to the batch script, within
    milliseconds), so a repetition counts as a second request only after ``grace`` seconds.
    """

    def __init__(self, grace: float = 5.0) -> None:
        self.name: str | None = None
        self._grace = grace
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.name is not None

    def install(self) -> StopRequest:
        """Replace the handlers of this process."""
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def close(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, now
        elif now - self._since > self._grace:
            # Files are written under temporary names and committed last: ending here harms none.
            os._exit(128 + number)
