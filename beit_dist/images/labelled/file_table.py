"""A list of files in a few arrays: millions of them are small, and quick to hand to loader processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from beit_dist.images.files import ImageFile
from beit_dist.images.gathering import Entry
from beit_dist.images.source import Source


class FileTable(Sequence[ImageFile]):
    """Files by number. As objects, each would take half a kilobyte, in every process.

    Args:
        sources: what the files lie in.
        entries: each with the number of its source; their labels are not kept.
    """

    def __init__(self, sources: Sequence[Source], entries: Sequence[Entry]) -> None:
        self.sources = tuple(sources)
        self._names = np.frombuffer(b"".join(entry.name for entry in entries), np.uint8)
        self._ends = np.cumsum([len(entry.name) for entry in entries], dtype=np.int64)
        self._numbers = np.array([(entry.source, entry.size, len(entry.at)) for entry in entries], np.int64)
        most = max((len(entry.at) for entry in entries), default=0)
        self._at = np.array([(*entry.at, *[0] * (most - len(entry.at))) for entry in entries], np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> ImageFile: ...
    @overload
    def __getitem__(self, number: slice) -> list[ImageFile]: ...
    def __getitem__(self, number: int | slice) -> ImageFile | list[ImageFile]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        start = int(self._ends[number - 1]) if number else 0
        source, size, places = self._numbers[number].tolist()
        at = tuple(self._at[number, :places].tolist())
        name = self._names[start : self._ends[number]].tobytes()
        return ImageFile(self.sources[source], Entry(name, source, at, size))
