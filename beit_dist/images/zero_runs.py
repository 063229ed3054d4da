"""Runs of zero bytes: what a lost disk block or the unwritten end of a download looks like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from beit_dist.images.rejection import damaged

SHORTEST = 64
"""Bytes. Entropy coders write bits that are close to random: half a kilobit of zeros is none of theirs."""

_ZEROS = re.compile(rb"\0+")


class ZeroRun(NamedTuple):
    """Zero bytes in a row."""

    start: int
    """Of the first one in the file."""
    length: int


def zero_runs(raw: bytes, start: int, end: int) -> Iterator[ZeroRun]:
    """The runs in ``raw[start:end]`` of more than :data:`SHORTEST` zeros."""
    needle = bytes(SHORTEST + 1)
    while (found := raw.find(needle, start, end)) >= 0:
        match = _ZEROS.match(raw, found, end)
        assert match is not None
        yield ZeroRun(found, match.end() - found)
        start = match.end()


def check_zeros(raw: bytes, start: int, end: int, most: int = SHORTEST) -> None:
    """Check that ``raw[start:end]`` holds at most ``most`` zeros in a row (and :data:`SHORTEST` at least).

    Raises:
        ImageRejectedError: it holds more.
    """
    for run in zero_runs(raw, start, end):
        if run.length > most:
            limit = f"data that can hold {most:,} in a row at most"
            raise damaged(f"{run.length:,} zero bytes at byte {run.start:,}, in {limit}")
