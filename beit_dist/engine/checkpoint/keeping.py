"""Which checkpoints are kept, and how the others are removed or put aside."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

from beit_dist.checkpoints.layout import (
    BAD,
    GIVEN_UP,
    MANIFEST,
    Saved,
    committed,
    parse_folder_name,
    read_manifest,
)
from beit_dist.config.run import CheckpointConfig
from beit_dist.storage.place import Place


def remove_old(folder: Place, settings: CheckpointConfig, attempt: int) -> None:
    """Remove checkpoints that need not be kept, and what older attempts left unfinished.

    Args:
        folder: ``RUN/checkpoints``.
        settings: what to keep.
        attempt: the number of this start.
    """
    found = committed(folder)
    for_good = kept_for_good(found, settings)
    for saved in found[settings.keep :]:
        if saved not in for_good:
            # Without its manifest a checkpoint does not exist: a removal cut short leaves no half one.
            saved.folder.remove(MANIFEST)
            remove(folder, saved.folder.name)
    whole = {saved.folder.name for saved in found}
    for entry in folder.list():
        name = parse_folder_name(entry)
        if name and name[1] < attempt and entry not in whole and not _is_damaged(folder / entry):
            remove(folder, entry)


def kept_for_good(found: Sequence[Saved], settings: CheckpointConfig) -> list[Saved]:
    """Checkpoints that stay however many newer ones there are: every n steps, and every n hours."""
    steps, hours = settings.keep_every_steps, settings.keep_every_hours
    kept = [saved for saved in found if steps and saved.step % steps == 0]
    since = None
    for saved in sorted(found, key=lambda saved: saved.step):
        at = saved.manifest.get("saved_at")
        # In either direction: after a clock that was years ahead for a while they must not be years apart.
        if hours and at is not None and (since is None or abs(at - since) >= 3600 * hours):
            kept.append(saved)
            since = at
    return kept


def set_aside(folder: Place) -> None:
    """Keep a damaged checkpoint out of the way, for somebody to look at."""
    if folder.is_local:
        names = (f"{folder.name}.bad{number or ''}" for number in itertools.count())
        folder.path.rename(next(path for path in map(folder.path.with_name, names) if not path.exists()))
    else:
        folder.write(BAD, b"")


def _is_damaged(folder: Place) -> bool:
    """Whether a checkpoint was committed but cannot be used; it stays, for somebody to look at."""
    return folder.exists(MANIFEST) and GIVEN_UP not in read_manifest(folder)


def remove(folder: Place, name: str) -> None:
    """Remove a checkpoint's folder as far as that goes."""
    with contextlib.suppress(OSError):
        folder.remove_folder(name)
