"""``--ranks N``: the command starts itself N times on this machine, without a launcher.

torchrun and deepspeed do that too, and more. Both print a traceback of their own at Ctrl-C, torchrun ends ranks
30 s later whatever they write, deepspeed gives the prompt back before its ranks have ended, and both want a port
that is free by luck. The ranks of this one are in the terminal's process group, so Ctrl-C reaches each of them
once; a signal sent to this process alone is passed on; it ends when all ranks have; and they meet at a socket that
is open before the first of them starts. (torchrun has its traceback from ``torch.distributed.elastic``, which
raises ``SignalException`` at a signal.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from beit_dist.engine.ranks.launchers import LISTENING, number_started
from beit_dist.engine.ranks.preemption import STOP_SIGNALS, end_at_interrupt
from beit_dist.errors import ConfigError

AUTO = "auto"
_PARENT = "BEIT_DIST_PARENT"  # the process that has started the ranks
_SIGNALS = {*STOP_SIGNALS, signal.SIGCHLD}
_BY_TERMINAL = 0x80  # SI_KERNEL in si_code: it went to the whole process group
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_NOTICE = 15.0
"""Seconds after a rank has failed in which the others notice by themselves, and say what they know ..."""
_END = 15.0
"""... and seconds until they are killed, once they were told to end."""


def how_many(asked: int | str | None, default: int, device: str = AUTO) -> int:
    """The number of ranks that ``--ranks`` asks for; ``auto`` is one for each GPU.

    Args:
        asked: None is ``default``.
        device: that of ``--device``.
    """
    if asked != AUTO:
        return default if asked is None else int(asked)
    if device not in (AUTO, "cuda") or (device == AUTO and os.environ.get("DS_ACCELERATOR") == "cpu"):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def started_here(asked: int | str | None, *, dry_run: bool, device: str = AUTO) -> int | None:
    """Start the ranks that ``--ranks`` asks for, and wait for them; the first thing a training's command does.

    Returns:
        The exit code: 0, or that of the rank that failed first. None in a process that is a rank itself.

    Raises:
        ConfigError: a launcher has started another number of ranks.
    """
    end_at_interrupt()
    if _PARENT in os.environ:
        _belong_to(int(os.environ[_PARENT]))
        return None
    if asked is None or dry_run:
        return None
    if (started := number_started() or 1) > 1:
        if asked in (started, AUTO):
            return None
        raise ConfigError(
            "--ranks", asked, f"{started}, as many as the launcher has started", "Leave --ranks out there."
        )
    ranks = how_many(asked, 1, device)
    return None if ranks == 1 else run_ranks([sys.executable, *sys.orig_argv[1:]], ranks)


def run_ranks(command: Sequence[str], ranks: int) -> int:
    """Run a command as each of the ranks, and wait for all of them; the exit code.

    Args:
        command: calls :func:`started_here`.
        ranks: how many.
    """
    sys.stdout.flush()
    environment = os.environ | _threads(ranks)
    # Waited for below, and left blocked in the ranks until they are ready for them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, ranks)) as meeting:
        processes = [_start(command, rank, ranks, meeting, environment) for rank in range(ranks)]
    try:
        return _Watch(processes).until_all_ended()
    finally:
        for process in processes:
            process.kill()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _threads(ranks: int) -> dict[str, str]:
    """Threads of a rank: PyTorch would take all cores for each."""
    if os.environ.get("OMP_NUM_THREADS"):
        return {}
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    print(f"{ranks} ranks on this machine, each of {threads} CPU threads (OMP_NUM_THREADS)", flush=True)
    return {"OMP_NUM_THREADS": str(threads)}


def _start(
    command: Sequence[str], rank: int, ranks: int, meeting: socket.socket, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    address, port = meeting.getsockname()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    place |= {"MASTER_ADDR": address, "MASTER_PORT": port, _PARENT: os.getpid()}
    kept = (meeting.fileno(),) if rank == 0 else ()
    if kept:
        place[LISTENING] = kept[0]
    own = environment | {name: str(value) for name, value in place.items()}
    return subprocess.Popen(command, env=own, pass_fds=kept)


class _Watch:
    """Waits for ranks, passes signals on, and ends those that are left when one has failed."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._processes = processes
        self._passed_on: set[int] = set()
        self._failed = 0  # exit code of the rank that failed first
        self._deadlines: list[float] = []  # when the others are told to end, and when they are killed

    def until_all_ended(self) -> int:
        while living := [process for process in self._processes if process.poll() is None]:
            self._look_for_failure()
            left = max(0.0, self._deadlines[0] - time.monotonic()) if self._deadlines else 3600.0
            got = signal.sigtimedwait(_SIGNALS, left)
            if got is not None and got.si_signo != signal.SIGCHLD:
                self._passed_on.add(got.si_signo)
                if got.si_code != _BY_TERMINAL:
                    _send(living, got.si_signo)
            elif self._deadlines and time.monotonic() >= self._deadlines[0]:
                self._deadlines.pop(0)
                _send(living, signal.SIGTERM if self._deadlines else signal.SIGKILL)
        self._look_for_failure()
        return self._failed

    def _look_for_failure(self) -> None:
        if self._failed:
            return
        for rank, process in enumerate(self._processes):
            code = process.poll() or 0
            if code < 0:
                number, code = -code, 128 - code
                if number not in self._passed_on:
                    cause = ": did the host run out of memory?" if number == signal.SIGKILL else ""
                    name = signal.Signals(number).name
                    print(f"rank {rank} was ended by {name}{cause}", file=sys.stderr, flush=True)
            if code:
                self._failed = code
                now = time.monotonic()
                self._deadlines = [now + _NOTICE, now + _NOTICE + _END]
                return


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)


def _belong_to(parent: int) -> None:
    """Let the signals come that :func:`run_ranks` has held back, and end with it, whatever ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_OF_PARENT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
