"""Loader processes: how they start, which signals they ignore, and that none of them outlives its rank.

A rank has threads of its own (collectives, CUDA, checkpoint writers), so workers are not forked from it but from
a fork server, which has imported what they need once. Two things do not come with that and are added here:

- Workers are children of the fork server. torch's watchdog asks for its parent process, and the fork server lives
  as long as any worker does, so workers of a killed rank would stay for ever.
- Schedulers send their signals to every process of a job. A worker that a signal ends takes the rank with it just
  when that wants to save a checkpoint; so would a fork server.
"""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection

from torch import multiprocessing as torch_multiprocessing

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""They are for the rank to act on."""

_PRELOAD = "beit_dist.stream.unborn"


def start_method(imported: str) -> str:
    """Start the fork server, if it does not run yet, from a thread that blocks signals from here on.

    Blocked signals are inherited by the fork server and by its children from their first instruction on, before
    any handler can be set. Call it in the thread that starts the workers, not in the main thread.

    Args:
        imported: the module that workers need; the fork server imports it once for all of them.
    """
    torch_multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOAD, imported])
    signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    resource_tracker.ensure_running()  # Python's own helper; by itself it would die of SIGUSR1
    signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)  # starting it has unblocked some of them
    forkserver.ensure_running()
    return "forkserver"


def start_early(imported: str) -> None:
    """Start the fork server now, so that it imports ``imported`` while this process imports what it needs itself.

    For the main thread of a rank that will have workers, before its long imports.
    """
    thread = threading.Thread(target=start_method, args=(imported,), name="fork-server")
    thread.start()
    thread.join()


class WorkerStart:
    """What a worker does first; given to the loader as ``worker_init_fn``.

    Args:
        stop: the reading end of a pipe whose other end only the rank has. It becomes readable when the rank
            closes that, or dies.
    """

    def __init__(self, stop: Connection) -> None:
        self.stop = stop

    def __call__(self, worker: int) -> None:
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._end_with_rank, name="end-with-rank", daemon=True).start()

    def _end_with_rank(self) -> None:
        """Wait for the other end to close, then leave."""
        self.stop.poll(None)
        os._exit(0)  # the main thread may hang in a read that no exception can end
