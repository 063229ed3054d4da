"""Runs trials, each in a process, several at once, until all are done, one fails, or time is over.

On a processor they are forked from this one, which has paid for the imports once. On a GPU each is a Python of its
own, since a forked process cannot use the one that its parent has looked for.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from beit_dist.commands.main import main
from beit_dist.errors import exit_cleanly
from study.places import Places
from study.trials import Trial

_PRELOADED = (
    "torch",
    "deepspeed",
    "torch._dynamo",
    "beit_dist.engine.launch",
    "beit_dist.commands.tokenizer",
    "beit_dist.tasks.pretraining.task",
    "beit_dist.tasks.tokenizer.task",
    "beit_dist.tasks.finetuning.classification",
    "beit_dist.tasks.finetuning.segmentation",
    "beit_dist.probing.job",
    "beit_dist.tokenizing.run",
)
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_WOKEN = {*_STOPS, signal.SIGCHLD}
_PATIENCE = 300.0
"""Seconds that trials have to save what they have, once they are told to stop."""
_STOPPED = (0, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT)
"""Exit codes of a trial that was told to stop, also before it had anything to save."""
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_TAIL = 2000
"""Characters of its output that a failure is told with."""


class Jobs:
    """Trials that run, one process each.

    Args:
        places: where things are.
        device: ``cpu``, ``cuda`` or ``auto``, for trials that compute.
        forked: fork them from this process, which then imports what they need; else start a Python for each.
        about: what the record of each says besides, such as the machine.
    """

    def __init__(self, places: Places, device: str, forked: bool, about: Mapping[str, str]) -> None:
        self._places, self._device, self._forked, self._about = places, device, forked, about
        self._running: dict[int, tuple[Trial, float]] = {}
        self.failed: dict[str, str] = {}
        self.stopped = False

    def run(self, trials: Sequence[Trial], at_once: int, deadline: float) -> None:
        """Run what is not done yet, in this order as far as what they need allows.

        Args:
            at_once: processes.
            deadline: by ``time.monotonic()``; then all are stopped, with checkpoints.
        """
        if self._forked:
            _preload()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WOKEN)
        try:
            while not self.stopped:
                self._start(trials, at_once)
                if not self._running:
                    return
                got = signal.sigtimedwait(_WOKEN, min(60.0, max(0.0, deadline - time.monotonic())))
                self.stopped = (got is not None and got.si_signo in _STOPS) or time.monotonic() >= deadline
                self._reap()
        finally:
            self._stop()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _start(self, trials: Sequence[Trial], at_once: int) -> None:
        running = {trial.name for trial, _ in self._running.values()}
        done = {trial.name for trial in trials if self._places.done(trial)}
        for trial in trials:
            if len(self._running) >= at_once:
                return
            waits = trial.name in done | running | set(self.failed) or not set(trial.needs) <= done
            if not waits:
                print(f"{time.strftime('%H:%M:%S')}  {trial.name}", flush=True)
                self._running[self._process(trial)] = trial, time.monotonic()

    def _process(self, trial: Trial) -> int:
        words, own = self._places.words(trial), self._places.own(trial)
        device = ("--device", self._device)
        words[1:1] = device
        own.mkdir(parents=True, exist_ok=True)
        self._places.begin(trial, self._about)
        log = os.open(f"{own}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        sys.stdout.flush()
        own_pid = os.getpid()
        pid = os.fork()
        if pid:
            os.close(log)
            return pid
        _become(log, own_pid)
        if not self._forked:
            os.execv(sys.executable, [sys.executable, "-m", "beit_dist", *words])
        sys.argv[:] = ["beit", *words]
        try:
            exit_cleanly(partial(main, words))
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)

    def _reap(self) -> None:
        for pid, (trial, began) in list(self._running.items()):
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if not ended:
                continue
            del self._running[pid]
            _spend(self._places.own(trial), time.monotonic() - began, usage.ru_utime + usage.ru_stime)
            code = os.waitstatus_to_exitcode(status)
            stopped = self.stopped and code in _STOPPED
            if not stopped and (code or not self._places.done(trial)):
                said = Path(f"{self._places.own(trial)}.log").read_text(errors="replace")[-_TAIL:]
                self.failed[trial.name] = f"exit code {code}: {said.strip()}"
                print(f"{trial.name} failed, exit code {code}:\n{said}", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        """Have all that runs save and end."""
        for pid in self._running:
            os.kill(pid, signal.SIGTERM)  # it is not reaped yet, so the number is still its
        until = time.monotonic() + _PATIENCE
        while self._running and time.monotonic() < until:
            signal.sigtimedwait({signal.SIGCHLD}, 0.5)
            self._reap()
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)


def spent(own: Path) -> dict[str, float]:
    """Seconds by the clock and of processor time that a trial took, over all its starts."""
    with suppress(FileNotFoundError):
        found: dict[str, float] = json.loads(Path(f"{own}.spent").read_text())
        return found
    return {"seconds": 0.0, "cpu_seconds": 0.0}


def _spend(own: Path, seconds: float, cpu_seconds: float) -> None:
    before = spent(own)
    now = {"seconds": before["seconds"] + seconds, "cpu_seconds": before["cpu_seconds"] + cpu_seconds}
    Path(f"{own}.spent").write_text(json.dumps(now))


def _preload() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what a collection looks at is copied
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise RuntimeError(f"{threads} threads run: a fork would lose all but one")


def _become(log: int, parent: int) -> None:
    """Be a process as a shell would start it, with its output in a file; it stops when the study dies."""
    for number in _WOKEN:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WOKEN)
    ctypes.CDLL(None).prctl(_DEATH_OF_PARENT, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, place)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (for as long as the process lives)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
