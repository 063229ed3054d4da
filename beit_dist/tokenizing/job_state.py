"""How far a job is, from its folder alone: its commits are counted, and none is opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from beit_dist.shards.manifest import HELD_OUT_NAME, MANIFEST_NAME
from beit_dist.storage.place import Place
from beit_dist.tokenizing.job import read_job
from beit_dist.tokenizing.sources import read_header

_COMMIT = re.compile(r"shard-\d{6,}\.json")


@dataclass(frozen=True)
class JobState:
    """What the workers of a job have made so far, of the images to train on and of those held out."""

    made: int
    """Shard numbers that are whole in all views."""
    shards: int
    """All of them."""
    images: int
    finished: bool
    """Whether the manifest is there."""
    active_at: float | None
    """Unix time of the newest commit; None where the folder's files tell no time."""


def job_state(out: Place) -> JobState:
    """Look at a data set in the making, or a finished one.

    Raises:
        DataError: its job or its list cannot be read.
        OSError: likewise its commits; of a store, that it does not answer.
    """
    job, header = read_job(out), read_header(out)
    parts = [(out, header.entries - header.held_out), (out / HELD_OUT_NAME, header.held_out)]
    made = [name for part, images in parts if images for name in part.list("commits") if _COMMIT.fullmatch(name)]
    active_at = None
    if out.is_local:
        folders = [part.path / "commits" for part, images in parts if images]
        active_at = max((os.stat(folder).st_mtime for folder in folders if folder.exists()), default=None)
    return JobState(
        made=len(made),
        shards=sum(-(-images // job.shard_samples) for _, images in parts),
        images=header.entries,
        finished=out.exists(MANIFEST_NAME),
        active_at=active_at,
    )
