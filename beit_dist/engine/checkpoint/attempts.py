"""Attempts: each start of a run takes the next number, and from then on the run's folder is its own.

``RUN/checkpoints/attempts/NNNNNN`` is created exclusively, so two starts never share a number. An older attempt
that still runs, or hung and was woken, finds the newer number before it commits anything, and stops. The file says
at which step the run was, so that starts which bring it no further can be counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid

from beit_dist.checkpoints.layout import GIVEN_UP, MANIFEST, parse_folder_name, sealed
from beit_dist.errors import CheckpointError, ConfigError
from beit_dist.storage.place import Place


class SupersededError(CheckpointError):
    """A newer attempt runs in the same folder; this one must leave it alone."""

    exit_code = 1


class Attempts:
    """The starts of a run.

    Args:
        checkpoints: ``RUN/checkpoints``.
    """

    def __init__(self, checkpoints: Place) -> None:
        self.number = 0  # of this attempt; 0 until it has begun
        self._checkpoints, self.place = checkpoints, checkpoints / "attempts"
        self._mark = b""  # what this attempt's file says, unlike any other's

    def begin(self, seen: int | None = None, step: int | None = None) -> None:
        """Take the next number; on rank 0 alone, the others are told.

        Args:
            seen: the newest number when this start looked at the run folder.
            step: of the newest checkpoint then; 0 if there was none.

        Raises:
            SupersededError: another start has taken a number since.
            ConfigError: the store would give a number to two.
        """
        self.place.make()
        mark = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex, "step": step}
        self._mark = json.dumps(mark).encode()
        # Folders count too: where a copy of a run lacks the attempts, its newest checkpoint must stay the newest.
        folders = (parse_folder_name(entry) for entry in self._checkpoints.list())
        newest = self.newest()
        number = max([newest, *(name[1] for name in folders if name)])
        while not self.number:
            number += 1
            if seen is not None and newest > seen:
                raise SupersededError(
                    f"superseded by attempt {newest}, which began in the meantime: this start stops"
                )
            if self.place.create(f"{number:06d}", self._mark):
                self.number = number
            else:
                newest = number
        if not self.place.is_local and self.place.create(f"{self.number:06d}", b"another"):
            raise ConfigError(
                "run",
                str(self._checkpoints.parent),
                "a store that refuses to create what exists (If-None-Match: *), but this one did create it",
                "Without that, two starts of a run could both believe to be the only one.",
            )
        self._give_up_unfinished()

    def refuse_if_superseded(self) -> None:
        """Raise SupersededError when a newer attempt has begun."""
        newest = self.newest()
        if newest > self.number:
            raise SupersededError(f"superseded by attempt {newest}: this run (attempt {self.number}) stops")
        # Not every store's conditional PUT lets only one of two succeed: the last one's content stays.
        if self._mark and not self.place.is_local and self.place.read(f"{newest:06d}") != self._mark:
            raise SupersededError(f"superseded by another start that also took number {newest}: this run stops")

    def _give_up_unfinished(self) -> None:
        """What older attempts have not committed by now they never will: this attempt continues without it.

        An older rank may be about to do it, having seen no newer attempt. A manifest is created only once, so
        either it was there before, and is found, or it never will be.
        """
        for entry in self._checkpoints.list():
            name = parse_folder_name(entry)
            folder = self._checkpoints / entry
            if name and name[1] < self.number and not folder.sizes([MANIFEST]).get(MANIFEST):
                given_up = sealed({GIVEN_UP: self.number})
                with contextlib.suppress(FileNotFoundError):  # its attempt has just removed it
                    if not folder.create(MANIFEST, given_up) and not folder.size(MANIFEST):
                        folder.write(MANIFEST, given_up)  # of a writer that ended or hangs before its content

    def fruitless(self, step: int, most: int) -> int:
        """How many of the newest attempts in a row have brought the run no further; not counted past ``most``.

        Args:
            step: of the newest checkpoint now; an attempt that began before it has made a checkpoint since.
            most: 1 or more.
        """
        newest = self.newest()
        for count in range(min(most, newest)):
            if (began_at := self._step(newest - count)) is None or began_at < step:
                return count
        return min(most, newest)

    def _step(self, number: int) -> int | None:
        """At which step an attempt began; None if it does not say, as those of older versions do not."""
        try:
            step = json.loads(self.place.read(f"{number:06d}")).get("step")
        except (OSError, ValueError, AttributeError):
            return None
        return step if isinstance(step, int) else None

    def newest(self) -> int:
        """The newest number; 0 where there is none."""
        return max((int(name) for name in self.place.list() if name.isdigit()), default=0)
