"""Whether a folder has room for what will be written to it."""

from __future__ import annotations

import shutil

from beit_dist.engine.memory import in_words
from beit_dist.errors import SpaceError
from beit_dist.storage.place import Place


def free_bytes(out: Place) -> int | None:
    """What a local folder, which need not be there yet, can take; None at a URL."""
    if not out.is_local:
        return None
    folder = out.path.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def check_room(out: Place, needed: int, what: str) -> None:
    """Refuse a local disk with too little room.

    Args:
        out: the folder of ``--out``.
        needed: bytes.
        what: they are needed for, and the way out.

    Raises:
        SpaceError: it has too little.
    """
    free = free_bytes(out)
    if needed and free is not None and free < needed:
        raise SpaceError(f"--out: {out} has {in_words(free)} free, expected {in_words(needed)} for {what}")
