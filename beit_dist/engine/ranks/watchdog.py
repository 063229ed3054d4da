"""Hangs: a thread that notices when no step ends and writes down where every thread of this rank is.

A rank that hangs says nothing by itself, and the others only that they wait for it. What a person needs is the
stacks of the rank that does *not* wait, so every rank dumps its own: into ``RUN/ranks/rank-XXXXX.stacks.txt``,
once per stall, on SIGUSR2, and on a fatal error (a segmentation fault, an abort of the collectives' watchdog).
Before there is a run folder they go to stderr.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, TextIO

from beit_dist.config.run import WatchdogConfig
from beit_dist.engine.endpoint import Health
from beit_dist.engine.metrics import Metrics

_log = logging.getLogger(__name__)


class Watchdog:
    """Watches that steps end; started by ``start``, given its file by ``open``, told of each step by ``beat``.

    Args:
        settings: how long is too long.
        folder: ``RUN/ranks``.
        rank: this rank.
    """

    def __init__(self, settings: WatchdogConfig, folder: Path, rank: int) -> None:
        self.path = folder / f"rank-{rank:05d}.stacks.txt"
        self.metrics: Metrics | None = None  # rank 0's, once there are any
        self.stalls = 0
        self._settings, self._rank = settings, rank
        self._last = time.monotonic()
        self._limit = settings.start_seconds  # None: not watched
        self._dumped = False
        self._begun = False  # a first step, or a measurement before it, has ended
        self._closed = threading.Event()
        self._file: TextIO | None = None  # stderr
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Register the dumps and begin to watch."""
        self._thread.start()
        self._register()
        return self

    def open(self) -> None:
        """The run folder is there: write into it from now on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        if self._thread.is_alive():
            self._register()

    def beat(self) -> None:
        """A step, or something else that took long and was expected to, has ended."""
        self._last = time.monotonic()
        self._limit = self._settings.stall_seconds
        self._dumped = False
        if self.metrics is not None:
            self._begun = True
            self.metrics.set({"beit_train_last_step_timestamp_seconds": time.time()})

    def health(self) -> Health:
        """Whether steps end; the same limit as for the stacks."""
        return Health.by_time(time.monotonic() - self._last, self._limit, self._begun)

    def close(self) -> None:
        """Stop watching and put the handlers back."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.unregister(signal.SIGUSR2)
            faulthandler.disable()
        if self._file is not None and not self._file.closed:
            empty = self._file.tell() == 0
            self._file.close()
            if empty:
                self.path.unlink(missing_ok=True)  # nothing happened: leave nothing

    def _register(self) -> None:
        file = self._file or sys.__stderr__
        if file is not None:
            faulthandler.enable(file, all_threads=True)
            faulthandler.register(signal.SIGUSR2, file, all_threads=True)

    def _watch(self) -> None:
        while not self._closed.wait(self._pause()):
            silent = time.monotonic() - self._last
            if self._limit is not None and silent > self._limit and not self._dumped:
                self._dumped = True
                self._dump(silent)

    def _pause(self) -> float:
        limits = [limit for limit in (self._settings.stall_seconds, self._settings.start_seconds) if limit]
        return min(10.0, min(limits) / 4)

    def _dump(self, seconds: float) -> None:
        self.stalls += 1
        host = socket.gethostname()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file = self._file or sys.__stderr__
        try:
            if file is not None:
                file.write(f"{now} rank {self._rank} on {host}: no step has ended for {seconds:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # a full disk may be why everything hangs
            _log.warning("rank %d on %s: the stacks could not be written: %s", self._rank, host, error)
        _log.warning(
            "rank %d on %s: no step has ended for %.0f s; its stacks are %s",
            self._rank,
            host,
            seconds,
            f"in {self.path}" if self._file is not None else "above",
        )
        if self.metrics is not None:
            self.metrics.add("beit_train_stalls")


def record_collectives(folder: Path, environment: MutableMapping[str, Any] = os.environ) -> None:
    """Have torch's flight recorder keep the last collectives and write them on a time-out; call it before joining.

    It serves NCCL, and writes nothing where the folder is not there yet. The files are ``flight-<rank>`` in
    ``folder``, for ``torchfrtrace``. What the user has set, by these or their older names, stays (torch 2.13:
    ``FlightRecorder.hpp``, ``ProcessGroupNCCL.hpp``).
    """
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), str(folder.resolve() / "flight-")),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
    ):
        if not any(name in environment for name in names):
            environment[names[0]] = value
