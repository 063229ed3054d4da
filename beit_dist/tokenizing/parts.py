"""The parts of a job: the images to train on, and those held out, which become a data set of their own.

The held-out images are the last ones of the list, which is in random order already: so the ids of the others are
the same as without them, no image has views on both sides, and every worker sees the same split in the list's
header. They have one view, made as those of the training images are: centre crops have other tokens (on the demo's
pictures the commonest token of training then had 0.2 % of the positions, and not 3.7 %), and no number of theirs
could be compared with one of the training.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from beit_dist.errors import ConfigError
from beit_dist.shards.manifest import HELD_OUT_NAME
from beit_dist.storage.place import Place
from beit_dist.tokenizing.job import Job
from beit_dist.tokenizing.sources import SourceList

_NUMBER = re.compile(r"\d{1,12}(\.\d{1,12})?%|\d{1,12}", re.ASCII)


class Part(NamedTuple):
    """A data set that a job writes."""

    name: str
    """What its progress is called; empty for the images to train on."""
    out: Place
    job: Job
    sources: SourceList


def parts_of(out: Place, job: Job, sources: SourceList) -> list[Part]:
    """The data sets of a job in the order in which they are finished: the one to train on is last.

    Args:
        out: the job's folder.
        job: as recorded there.
        sources: its list.
    """
    parts = [Part("", out, job, sources)]
    held_out = sources.held_out()
    if held_out is not None:
        parts.insert(0, Part("held-out images", out / HELD_OUT_NAME, held_out_job(job), held_out))
    return parts


def held_out_job(job: Job) -> Job:
    """How held-out images are made: as the others, once."""
    return replace(job, views=1)


def held_out_images(text: str | None, entries: int) -> int:
    """How many of a list's images are held out: a number, or a percentage such as ``2%``, rounded up.

    Args:
        text: what the user gave; None and 0 hold out none.
        entries: of the list.

    Raises:
        ConfigError: it is neither, or leaves no image to train on.
    """
    check_held_out(text)
    if text is None:
        return 0
    held_out = math.ceil(Fraction(text[:-1]) * entries / 100) if text.endswith("%") else int(text)
    if held_out and held_out >= entries:
        raise ConfigError(
            "--held-out",
            text,
            f"fewer than all images, of which there are {entries}",
            "At least one must be left to train on: hold out fewer, or give more --images.",
        )
    return held_out


def check_held_out(text: str | None) -> None:
    """Refuse what is neither a number nor a percentage; see :func:`held_out_images`."""
    if text is not None and _NUMBER.fullmatch(text) is None:
        raise ConfigError("--held-out", text, "a number of images, or a percentage such as 2%")
