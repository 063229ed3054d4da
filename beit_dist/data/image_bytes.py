"""The bytes of one image: those of a file, or a range of a tar's, here or at a URL."""

from __future__ import annotations

import functools
import os
import tarfile

from beit_dist.storage.access import Access
from beit_dist.storage.opening import place_of
from beit_dist.storage.place import Buffer, is_url


def read_image(place: str, offset: int | None, size: int, access: Access) -> bytes:
    """Read an image; fewer or more bytes than ``size`` mean that the images changed since they were listed.

    Of a tar none are given if another header than that of ``size`` bytes stands before them: the tar was written
    anew, and what lies there now would pass for a damaged image. Safe in any number of threads.

    Args:
        place: path or URL, checked when it was listed, of the file or tar that holds it.
        offset: where its bytes begin in a tar; None for a file of its own.
        size: in bytes.
        access: how URLs are reached.

    Raises:
        FileNotFoundError: the file or tar is gone.
        StorageError: a store failed for as long as it was tried again.
        OSError: it cannot be read.
    """
    if is_url(place):
        return _read_remote(place, offset, size, access)
    if offset is None:
        with open(place, "rb") as file:
            return file.read()
    # Kept by its name until the read is done: it closes with its last reference, and of two threads that open a
    # tar at once only one's is in the cache.
    descriptor = _descriptor(place)
    return _without_header(_read_range(descriptor.number, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + size))


def _read_remote(url: str, offset: int | None, size: int, access: Access) -> bytes:
    place, name = place_of(url, access)
    if offset is None:
        return place.read(name)
    try:
        raw = place.read_range(name, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + size)
    except EOFError:
        return b""
    return _without_header(raw)


def _without_header(member: Buffer) -> bytes:
    """What follows a tar's header; nothing if it is none, or is of another size."""
    content = bytes(memoryview(member)[tarfile.BLOCKSIZE :])
    try:
        header = tarfile.TarInfo.frombuf(bytes(member[: tarfile.BLOCKSIZE]), tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return b""
    return content if header.size == len(content) else b""


def _read_range(file: int, offset: int, size: int) -> bytes:
    raw = b""
    while len(raw) < size:  # network file systems may cut a read short
        more = os.pread(file, size - len(raw), offset + len(raw))
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
