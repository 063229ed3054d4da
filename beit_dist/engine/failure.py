"""A rank that fails: what is said, what is written, and how the ranks that fail because of it keep quiet.

When one rank ends, the others' collectives break within moments, with errors that have nothing to do with the
cause. ``FAILED`` is created exclusively, so it is the first failure's; who comes later points to it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import traceback

from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.run_folder import RunFolder
from beit_dist.errors import TrainingError, UserError

_FULL, _REFUSED = (errno.ENOSPC, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_ANSWER = re.compile(r"timed out|timeout|pair closure", re.IGNORECASE)
_UNMET = re.compile(
    r"client socket has timed out|waiting for clients|ping failed|failed to connect|device/all", re.IGNORECASE
)
_TAKEN = re.compile(r"EADDRINUSE|address already in use|server socket has failed", re.IGNORECASE)
_GENERAL = re.compile(r"\. This is typically caused by")
"""Where gloo's advice on any failure begins, which says nothing of this one."""
_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|read error|write error|socket", re.IGNORECASE)


class Failure:
    """One rank's failure, in words.

    Args:
        error: what was raised.
        ranks: this process among all.
        limit: the time limit of collectives that held, as a setting.
    """

    def __init__(self, error: BaseException, ranks: Ranks, limit: str) -> None:
        self._rank, self._host = ranks.rank, socket.gethostname()
        self._trace = "".join(traceback.format_exception(error))
        self._details = error.details if isinstance(error, TrainingError) else None
        self.exit_code = error.exit_code if isinstance(error, UserError) else 1
        self.text = str(error) if isinstance(error, UserError) else _explained(error, limit) or self._trace
        self._own_fault = self.text == self._trace or isinstance(error, UserError)

    @property
    def said(self) -> str:
        """What to print where no other rank has failed before."""
        return f"error: rank {self._rank} on {self._host}: {self.text}"

    def report(self, run: RunFolder, since: float) -> str:
        """Leave ``FAILED``, or point to the rank that did so first; what to print, if anything.

        Args:
            run: the run folder.
            since: Unix time at which this start began.
        """
        first = run.mark_failed(
            since,
            rank=self._rank,
            exit_code=self.exit_code,
            error=self.text,
            **({"details": self._details} if self._details else {}),
            **({} if self._own_fault else {"traceback": self._trace}),
        )
        if first is None:
            return self.said
        self.exit_code = int(first.get("exit_code", self.exit_code))
        if first.get("error") == self.text:  # found by all ranks alike: once is enough
            return ""
        with contextlib.suppress(OSError):
            (run.ranks / f"rank-{self._rank:05d}.error.txt").write_text(self._trace, encoding="utf-8")
            run.keep_files_of(self._rank)
        other = f"rank {first.get('rank')} on {first.get('host')}"
        return f"rank {self._rank} on {self._host} stops: {other} failed first"


def _explained(error: BaseException, limit: str) -> str | None:
    """What a disk or a collective says that refuses, in our words; None for anything else."""
    if isinstance(error, OSError) and error.errno in _FULL:
        where = error.filename or f"in {traceback.extract_tb(error.__traceback__)[-1].name}()"
        return f"{error.strerror}: {where}. Make room and start again."
    if isinstance(error, OSError) and error.errno in _REFUSED and error.filename:
        return f"{error.strerror}: {error.filename}. Change its owner, mode or mount and start again."
    said = str(error)
    kind = f"{type(error).__module__}.{type(error).__name__}".lower()
    collective = "dist" in kind or "gloo" in said.lower() or "nccl" in said.lower() or "pair closure" in said
    if not collective:
        return None
    cause = _GENERAL.split(said.splitlines()[0])[0]
    port = os.environ.get("MASTER_PORT")
    if _UNMET.search(said):
        return (
            f"the ranks did not all meet at MASTER_ADDR:MASTER_PORT = {os.environ.get('MASTER_ADDR')}:{port} "
            f"within {limit}. It must name the host of rank 0 as all hosts know it, and a port that they can "
            f"reach and no other program uses. Every rank must have been started. ({cause})"
        )
    if _NO_ANSWER.search(said):
        return (
            f"another rank did not answer within {limit}: it hangs, or its host does. RUN/ranks/*.stacks.txt and "
            f"`kill -USR2` show where each rank is. ({cause})"
        )
    if _TAKEN.search(said):
        refused = "EACCES" in said
        by = (
            "is reserved for the system"
            if refused
            else "is used by another run or by some program's outgoing connection"
        )
        return (
            f"port {port} of this host, where the ranks were to meet, {by}. Give the launcher another "
            "--master_port (MASTER_PORT), best from 1024 to 32767: Linux uses those from 32768 on for outgoing "
            f"connections. ({cause})"
        )
    if _GONE.search(said):
        return (
            "the connection to another rank broke: it was killed (out of memory?), or its host is gone. Its own "
            f"output may say more. ({cause})"
        )
    return None
