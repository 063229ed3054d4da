"""The bytes of files that hold images: whole, or a range, here or at a URL."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

from beit_dist.images.rejection import ChangedError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import place_of
from beit_dist.storage.place import Buffer, Place, is_url
from beit_dist.storage.streams import open_ranges

_WINDOW = 32 << 10
"""Bytes of a request for a header: what is small beside it comes along, large images stay where they are."""


def open_file(path: str, access: Access, window: int = _WINDOW) -> BinaryIO:
    """The file or URL ``path``, to be read here and there; of a URL at least ``window`` bytes at a time."""
    return open_ranges(*place_of(path, access), window)


def read_whole(path: str, access: Access) -> bytes:
    """All bytes of the file or URL ``path``.

    Raises:
        FileNotFoundError: it is gone.
        StorageError: a store failed for as long as it was tried again.
        OSError: it cannot be read.
    """
    if is_url(path):
        place, name = place_of(path, access)
        return place.read(name)
    with open(path, "rb") as file:
        return file.read()


def middle(path: str, offset: int, size: int, most: int, access: Access) -> bytes:
    """Up to ``most`` bytes from the middle of the ``size`` bytes at ``offset`` of the file or URL ``path``.

    Raises:
        ChangedError: the file ends before that.
        StorageError: a store failed for as long as it was tried again.
        OSError: it cannot be read.
    """
    place, name = place_of(path, access)
    count = min(size, most)
    try:
        return bytes(place.read_range(name, offset + (size - count) // 2, count))
    except EOFError:
        raise ChangedError("became shorter") from None


def ranges(path: str, access: Access) -> Callable[[int, int], Buffer]:
    """Reads (offset, size) of the file or URL ``path``, again and again: a local one stays open in a cache.

    Where the file ends before that, fewer bytes come, or none at a URL. Safe in any number of threads.

    Raises:
        FileNotFoundError: it is gone.
        OSError: it cannot be opened.
    """
    if is_url(path):
        return partial(_fetch_range, *place_of(path, access))
    # Kept by its name until the read is done: it closes with its last reference, and of two threads that open a
    # file at once only one's is in the cache.
    return partial(_read_range, _descriptor(path))


def _fetch_range(place: Place, name: str, offset: int, size: int) -> Buffer:
    try:
        return place.read_range(name, offset, size)
    except EOFError:
        return b""


def _read_range(file: _Descriptor, offset: int, size: int) -> bytes:
    raw = b""
    while len(raw) < size:  # network file systems may cut a read short
        more = os.pread(file.number, size - len(raw), offset + len(raw))
        if not more:
            break
        raw += more
    return raw


class _Descriptor:
    """An open file that closes with its last reference, so that a cache may drop it while another thread reads."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_descriptor = functools.lru_cache(maxsize=32)(_Descriptor)
