"""Training processes that start at once, forked by ``support.fork_server``; used as ``subprocess.Popen`` is."""

from __future__ import annotations

import functools
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from support.fork_server import Request

_SERVER = Path(__file__).with_name("fork_server.py")
_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
_READ_ONCE = (*_ENVIRONMENT, "PYTHONPATH", "PYTHONHASHSEED", "DNNL_MAX_CPU_ISA", "LD_PRELOAD")
"""Variables that the server's imports have read: a fork with other ones would not see them."""


@functools.cache
def _server() -> tuple[socket.socket, dict[str, str]]:
    """The server of this process, which ends with it, and its environment."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | _ENVIRONMENT
    with its:
        subprocess.Popen(
            [sys.executable, str(_SERVER), str(its.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            pass_fds=[its.fileno()],
            start_new_session=True,
        )
    return ours, environment


class Forked:
    """A process that runs a Python program as one rank, or forks several and waits for them.

    Args:
        argv: the program's path, and its arguments.
        environment: its variables; those that imports read must be those of this process.
        stdout: a pipe by default. What it says as an error goes there too.
        ranks: started with torch's variables and nothing else. If one fails the others are ended.
        port: where several ranks meet.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        stdout: int | IO[str] = subprocess.PIPE,
        start_new_session: bool = False,
        ranks: int = 1,
        port: int = 0,
    ) -> None:
        channel, known = _server()
        own = {**environment, **_ENVIRONMENT}
        other = [name for name in _READ_ONCE if own.get(name) != known.get(name)]
        if other:
            raise ValueError(f"{', '.join(other)}: read before a fork; start a process of its own")
        request = Request(list(argv), own, str(folder), start_new_session, ranks, port)
        self.args = list(argv)
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        self._output = b""
        self._report, its_report = os.pipe()
        its_stdin = os.open(os.devnull, os.O_RDONLY)
        if stdout == subprocess.PIPE:
            output, its_output = os.pipe()
            self.stdout = io.TextIOWrapper(io.FileIO(output))  # type: ignore[type-var]
        else:
            its_output = os.dup(stdout if isinstance(stdout, int) else stdout.fileno())
        given = [its_stdin, its_output, its_output, its_report]
        socket.send_fds(channel, [json.dumps(asdict(request)).encode()], given)
        for descriptor in set(given):
            os.close(descriptor)
        self.pid = self._told()

    def _told(self) -> int:
        """The next number that is reported: that of the process, later its exit code."""
        digits = b""
        while not digits.endswith(b"\n"):
            digit = os.read(self._report, 1)
            if not digit:
                raise ChildProcessError("the fork server has ended: see its standard error")
            digits += digit
        return int(digits)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._ended(0)

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None and _readable(self._report, seconds):
            self.returncode = self._told()
            os.close(self._report)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All that it has printed, and processes of its own that have its output, once it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        if self.stdout is not None and not self.stdout.closed:
            while _readable(self.stdout.fileno(), left()):
                some = os.read(self.stdout.fileno(), 2**16)
                if not some:
                    self.stdout.close()
                    break
                self._output += some
            else:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0, self._output)
        self.wait(left())
        return self._output.decode(), None

    def send_signal(self, number: int) -> None:
        """Send it a signal unless it is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _readable(descriptor: int, seconds: float | None) -> bool:
    """Whether there is something to read, or the end, within so many seconds (None: whenever it comes)."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(seconds))
