"""One rank's part of a save, in a thread that gives way to the training."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from beit_dist.checkpoints.files import write_fragments
from beit_dist.checkpoints.image import FileImage
from beit_dist.engine.checkpoint.attempts import SupersededError
from beit_dist.storage.place import Place

FAILED = ".failed"
"""Ends the name of the file that a rank leaves when it could not write."""
_NICE = 10  # a tenth of the training's share of a core that both want: a save gets on, and is hardly felt


class Writing(threading.Thread):
    """Writes one rank's file; on rank 0 also commits.

    There is no collective in here: ranks see each other's files, so a thread never meets the training's
    collectives in another order than a peer's does.

    Args:
        folder: the checkpoint's.
        step: the step that is saved.
        rank: this rank.
        image: what it writes.
        commit: rank 0's last act, in the thread: wait for the others, and commit.
        urgent: nothing is trained meanwhile, so the writing need not give way to anything.
    """

    def __init__(
        self, folder: Place, step: int, rank: int, image: FileImage, commit: Callable[[], None], *, urgent: bool
    ) -> None:
        super().__init__(name=f"checkpoint-{step}", daemon=True)
        self.folder, self.step = folder, step
        self.fault = ""
        self.superseded = ""
        self.seconds = 0.0
        self._rank, self._image, self._commit, self._urgent = rank, image, commit, urgent
        self._began = time.monotonic()

    def run(self) -> None:
        """Write, then on rank 0 commit; whatever goes wrong is kept for ``CheckpointStore.finish_save``."""
        try:
            if not self._urgent:
                _yield_to_others()
            self.folder.make()
            write_fragments(self.folder, self._rank, self._image)
            if self._rank == 0:
                self._commit()
        except SupersededError as error:
            self.superseded = str(error)
        except Exception as error:
            self.fault = f"rank {self._rank}: {error}"
            with contextlib.suppress(OSError):  # so that rank 0 need not wait for its time limit
                self.folder.write(f"rank-{self._rank:05d}{FAILED}", b"")
        self.seconds = time.monotonic() - self._began


def _yield_to_others() -> None:
    """Let this thread, and those that it starts, run when the training does not want the core (Linux only)."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICE))
