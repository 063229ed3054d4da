"""The bytes of one image: those of a file, or a range of a tar's, here or at a URL."""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Callable
from functools import partial

from beit_dist.storage.access import Access
from beit_dist.storage.opening import place_of
from beit_dist.storage.place import Buffer, is_url

_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = 64 << 10
"""Most bytes of a PAX header that are looked at; most have a kilobyte, access lists and the like can take more."""


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
        where, name = place_of(place, access)
        return where.read(name) if offset is None else _member(partial(where.read_range, name), offset, size)
    if offset is None:
        with open(place, "rb") as file:
            return file.read()
    # Kept by its name until the read is done: it closes with its last reference, and of two threads that open a
    # tar at once only one's is in the cache.
    descriptor = _descriptor(place)
    return _member(partial(_read_range, descriptor.number), offset, size)


def read_part(place: str, offset: int, size: int, access: Access) -> bytes:
    """``size`` bytes of the file or URL ``place`` from ``offset`` on.

    Raises:
        EOFError: the file ends before that.
        StorageError: a store failed for as long as it was tried again.
        OSError: it cannot be read.
    """
    where, name = place_of(place, access)
    return bytes(where.read_range(name, offset, size))


def _member(read: Callable[[int, int], Buffer], offset: int, size: int) -> bytes:
    """A tar's member; nothing if there is no header before it, or that of another size."""
    start = offset - tarfile.BLOCKSIZE
    try:
        raw = memoryview(read(start, tarfile.BLOCKSIZE + size))
        header, content = bytes(raw[: tarfile.BLOCKSIZE]), bytes(raw[tarfile.BLOCKSIZE :])
        said = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape").size
        if said != len(content):
            before = max(0, start - _EXTENDED)
            said = _extended_size(bytes(read(before, start - before)) + header)
    except (EOFError, tarfile.TarError, ValueError):
        return b""
    return content if said == len(content) else b""


def _extended_size(headers: bytes) -> int:
    """The size in a PAX header before the last of ``headers``, where it may stand alone; -1 without one."""
    last = len(headers) - tarfile.BLOCKSIZE
    for at in range(last - 2 * tarfile.BLOCKSIZE, -1, -tarfile.BLOCKSIZE):
        try:
            header = tarfile.TarInfo.frombuf(
                headers[at : at + tarfile.BLOCKSIZE], tarfile.ENCODING, "surrogateescape"
            )
        except tarfile.HeaderError:  # a block of its records
            continue
        blocks = -(-header.size // tarfile.BLOCKSIZE)
        if header.type in _PAX and at + (1 + blocks) * tarfile.BLOCKSIZE == last:
            with tarfile.open(fileobj=io.BytesIO(headers[at:]), mode="r:") as tar:
                member = tar.next()
                return -1 if member is None else member.size
    return -1


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
