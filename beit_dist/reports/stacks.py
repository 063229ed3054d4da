"""What the ranks of a stalled run wait in, from the stacks that they have written to ``RUN/ranks``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

_NAME = re.compile(r"rank-(\d+)\.stacks\.txt")
_BEGIN = re.compile(rb"^(?:Current thread|Thread) 0x\w+ \(most recent call first\):\n", re.MULTILINE)
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.MULTILINE)
_OURS = re.compile(r".*/(beit_dist/.+)")
_SILENT = "has written no stacks: its process is frozen, or its host is gone"
_ALL_SILENT = "have written no stacks, as while they measure on held-out data; or all processes are frozen"
_END = 1 << 16
"""Bytes at the end of a file that hold its last stack, which is that of the main thread."""


def waits_of(ranks: Path, since: float) -> list[str]:
    """A line for each place where ranks wait, the one with the fewest ranks first.

    Args:
        ranks: ``RUN/ranks``.
        since: Unix time; a file that was written before it tells of another stall.
    """
    where: dict[str, list[int]] = defaultdict(list)
    for rank, path in _files(ranks):
        where[_place(path, since)].append(rank)
    if where.keys() == {_SILENT}:  # a rank that hangs makes the others wait, and these write
        return [f"all ranks {_ALL_SILENT}"]
    groups = sorted(where.items(), key=lambda group: (len(group[1]), group[1]))
    return [f"{'rank' if len(found) == 1 else 'ranks'} {_in_words(found)}: {place}" for place, found in groups]


def _files(ranks: Path) -> Iterator[tuple[int, Path]]:
    if ranks.is_dir():
        for path in sorted(ranks.iterdir()):
            found = _NAME.fullmatch(path.name)
            if found:
                yield int(found[1]), path


def _place(path: Path, since: float) -> str:
    """The call in which a rank's main thread is, and the line of ours that led to it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0 or path.stat().st_mtime < since:
                return _SILENT
            file.seek(max(0, size - _END))
            text = file.read()
    except OSError as error:
        return f"stacks cannot be read: {error.strerror}"
    frames = list(_FRAME.finditer(_BEGIN.split(text)[-1].decode(errors="replace")))
    if not frames:
        return "stacks that say nothing of its main thread"
    called = frames[0]["function"]
    for frame in frames:
        ours = _OURS.fullmatch(frame["file"])
        if ours:
            return f"{called}, from {ours[1]}:{frame['line']} in {frame['function']}"
    return f"{called}, {frames[0]['file']}:{frames[0]['line']}"


def _in_words(ranks: Sequence[int]) -> str:
    """``0-2, 5``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
