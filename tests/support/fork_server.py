"""Forks ranks from a process that has imported PyTorch and DeepSpeed; ``support.forked`` starts it for tests.

The imports of a rank take far longer than what most tests train. They are done once here, and no thread runs yet,
so that a fork is all that a new process would be: with the arguments, variables, folder, and open files that it is
given, and signals and buffers as Python sets them. Between a request and its process stands a minder, which waits
for the end of it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import math
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PRELOADED = (
    "torch",
    "deepspeed",
    "beit_dist.commands.train",
    "beit_dist.commands.tokenizer",
    "beit_dist.engine.launch",
    "beit_dist.tasks.pretraining.task",
    "beit_dist.tasks.tokenizer.task",
    # What the first optimizer of torch and the first engine of DeepSpeed import. Not DeepSpeed's Muon, which
    # the engine imports in its own way.
    "torch._dynamo",
)
MOST_BYTES = 2**20
"""Of one request."""
GRACE = 30.0
"""Seconds that other ranks have to end by themselves once they are told to."""


@dataclass(frozen=True)
class Request:
    """A process to be."""

    argv: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool
    ranks: int
    port: int
    """Where several ranks meet."""


def environment_of(rank: int, ranks: int, port: int | str) -> dict[str, str]:
    """Torch's variables."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def serve(channel: socket.socket) -> Request:
    """Fork a process for each request; returns in these only, and ends with the tests' process."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MOST_BYTES, 4)
        if not message:
            sys.exit()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # minders that have ended
                pass
        if (threads := len(os.listdir("/proc/self/task"))) != 1:
            raise RuntimeError(f"{threads} threads run: a fork would lose all but one")
        if os.fork() == 0:
            channel.close()
            *files, report = descriptors
            request = Request(**json.loads(message))
            _mind(files, report)
            _become(request, files)
            return request
        for descriptor in descriptors:
            os.close(descriptor)


def _mind(files: list[int], report: int) -> None:
    """Fork, and report the number and the end of the new process; returns in that one only."""
    pid = os.fork()
    if pid == 0:
        os.close(report)
        return
    for descriptor in files:
        os.close(descriptor)
    os.write(report, b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(request: Request, files: list[int]) -> None:
    """Be as if Python had just been started by this request."""
    if request.new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(request.environment)
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = _stream(number, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    tempfile.tempdir = None  # what an import has found in the server's variables
    os.chdir(request.folder)
    sys.argv[:], sys.orig_argv[:] = request.argv, [sys.executable, *request.argv]
    sys.path[0] = str(Path(request.argv[0]).parent)


def _stream(number: int, before: io.TextIOWrapper) -> io.TextIOWrapper:
    """A standard stream as Python makes it; the server's knows what its file could do, which another may not."""
    file = io.FileIO(number, "w", closefd=False)
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    by_line = not unbuffered and (number == 2 or file.isatty())
    binary = file if unbuffered else io.BufferedWriter(file)
    return io.TextIOWrapper(
        binary,  # type: ignore[arg-type]
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=by_line,
        write_through=unbuffered,
    )


def as_a_rank(request: Request) -> None:
    """Fork the ranks of a request for several, and wait for them; returns in a rank only.

    If one fails the others are told to end, and the exit code is its.
    """
    ranks: list[int] = []
    for rank in range(request.ranks):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.environ.update(environment_of(rank, request.ranks, request.port))
            return
    failed, patience = 0, math.inf
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ranks.remove(pid)
        if pid and not failed and status:
            failed, patience = os.waitstatus_to_exitcode(status), time.monotonic() + GRACE
            _send(ranks, signal.SIGTERM)
        elif not pid:
            if time.monotonic() > patience:
                _send(ranks, signal.SIGKILL)
            time.sleep(0.02)
    sys.exit(failed if failed >= 0 else 1)


def _send(ranks: list[int], number: signal.Signals) -> None:
    for rank in ranks:
        os.kill(rank, number)  # it is not reaped yet, so the number is still its


def main() -> None:
    """Import, serve, and run what is asked for, in the process that is forked for it."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what a collection looks at is copied
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        request = serve(channel)
    if request.ranks > 1:
        as_a_rank(request)
    runpy.run_path(request.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
