"""Runs a command of beit that is killed when it has given a file its name for the n-th time, or just before.

    dying.py N before|after COMMAND ...

Jobs on images have parts of 8.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

from beit_dist.commands.main import main
from beit_dist.inference import job as jobs
from beit_dist.storage import durable
from beit_dist.storage.durable import publish

COUNT = itertools.count(1)


def dying(temporary: Path, path: Path) -> None:
    """Stands in for ``publish``."""
    last = next(COUNT) == int(sys.argv[1])
    if last and sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    publish(temporary, path)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    durable.publish = dying
    jobs._LEAST = jobs._MOST = 8
    sys.exit(main(sys.argv[3:]))
