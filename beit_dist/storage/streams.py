"""Files of a place as Python's readers want them: from start to end, or here and there without the rest."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from beit_dist.storage.place import Place


def open_stream(place: Place, name: str) -> BinaryIO:
    """A file to be read once from its start; at a URL in ranges of 8 MiB."""
    if place.is_local:
        return open(place.path / name, "rb")
    return io.BufferedReader(_Chunks(place.chunks(name)), 1 << 20)


def open_ranges(place: Place, name: str, window: int) -> BinaryIO:
    """A file to be read here and there; at a URL at least ``window`` bytes are fetched at a time."""
    if place.is_local:
        return open(place.path / name, "rb")
    return _Ranges(place, name, window)  # type: ignore[return-value]  # a raw file has all that is asked of it


class _Chunks(io.RawIOBase):
    def __init__(self, chunks: Iterator[memoryview]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = next(self._chunks, memoryview(b""))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


class _Ranges(io.RawIOBase):
    def __init__(self, place: Place, name: str, window: int) -> None:
        self._place, self._name, self._window = place, name, window
        self._size, self._position = place.size(name), 0
        self._held, self._start = bytearray(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        at = self._position - self._start
        if at < 0 or at + count > len(self._held):
            self._held = bytearray(min(max(count, self._window), self._size - self._position))
            self._start, at = self._position, 0
            self._place.read_into(self._name, self._start, memoryview(self._held))
        buffer[:count] = self._held[at : at + count]
        self._position += count
        return count
