"""A terminal of its own for a command, as a person has one: with Ctrl-C, and everything that was shown."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import psutil
from support.processes import left_of, members


def _words(process: psutil.Process) -> str:
    """The command line; empty where the process is about to be gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _as_a_foreground_job() -> None:
    """Also where the tests run in the background of a script, whose jobs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """Runs a command as the foreground job of a new terminal; what is left of it is killed at the block's end.

    Args:
        command: the command line.
        options: those of ``Popen``.

    Attributes:
        shown: all that the terminal has got.
    """

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self._ours, its = os.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            command,
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
            preexec_fn=_as_a_foreground_job,
            **options,
        )
        os.close(its)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in members(self.process.pid):
            process.kill()
        self.process.wait()
        self._reader.join(timeout=10)
        os.close(self._ours)

    def ctrl_c(self) -> None:
        """Press it."""
        os.write(self._ours, b"\x03")

    def until(self, condition: str | Callable[[], Any], seconds: float = 120) -> None:
        """Wait until a text is shown, or something else is true."""
        end = time.monotonic() + seconds
        while not (condition in self.shown if isinstance(condition, str) else condition()):
            assert time.monotonic() < end, f"no {condition}: {self.shown}"
            assert self.process.poll() is None, f"ended before {condition}: {self.shown}"
            time.sleep(0.01)

    def end(self, seconds: float = 120) -> int:
        """Wait until the prompt would be back; the exit code.

        Raises:
            AssertionError: a process of the job still runs then.
        """
        code = self.process.wait(seconds)
        left = members(self.process.pid)
        ranks = [words for words in map(_words, left) if words and "multiprocessing" not in words]
        assert not ranks, ranks
        assert not left_of(left, 30)  # a loader's server ends, silently, when it sees that its rank has
        self._reader.join(timeout=10)
        return code

    def _read(self) -> None:
        while True:
            try:
                content = os.read(self._ours, 2**16)
            except OSError:  # the last of its processes has ended
                return
            self.shown += content.decode(errors="replace")
