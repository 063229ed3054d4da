"""A new file that is written past the page cache.

What a program writes is copied into the page cache first, and for a gigabyte the system has to find and to clear a
gigabyte of memory, which can take longer than the disk does, and drives out what others read again (the shards).
``O_DIRECT`` writes from the program's memory. It wants whole blocks at aligned addresses; everything else goes
through a small aligned buffer, and the last part of a block through the page cache after all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ALIGNMENT = 4096
"""Bytes that divide memory addresses, offsets and lengths; 512 would do for some disks."""
_BUFFER = 4 << 20
_REQUEST = 16 << 20  # bytes of one system call


def aligned_memory(size: int) -> mmap.mmap:
    """Zeroed memory from the start of a page on; processes that are forked do not get it.

    A page that a forked process shares must not be under direct I/O (``man 2 open``).
    """
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # a kernel without huge pages; with them memory is found much sooner
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class DirectFile(io.RawIOBase):
    """Opens ``path`` for writing; a file system without direct I/O gets ordinary writes.

    ``write`` takes all that it is given. As with any file, ``flush`` hands everything to the system and
    ``os.fsync`` makes it durable.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
            self.is_direct = True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            self._descriptor = os.open(path, flags, 0o666)
            self.is_direct = False
        self._buffer = memoryview(aligned_memory(_BUFFER))
        self._filled = 0

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def write(self, content: ReadableBuffer, /) -> int:
        """Write all of ``content``, without a copy where it is aligned; its length in bytes.

        Raises:
            OSError: the system refuses it.
        """
        left = memoryview(content).cast("B")
        size = len(left)
        while len(left):
            if not self._filled and (straight := self._straight(left)):
                self._put(left[:straight])
                left = left[straight:]
                continue
            taken = min(len(left), _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + taken] = left[:taken]
            self._filled += taken
            left = left[taken:]
            if self._filled == _BUFFER:
                self._empty()
        return size

    def flush(self) -> None:
        """Hand what is in the buffer to the system; what is written later goes through the page cache."""
        if not self.closed and self._filled:
            self._empty()

    def close(self) -> None:
        """Flush and close."""
        if not self.closed:
            try:
                super().close()  # flushes
            finally:
                os.close(self._descriptor)

    def _straight(self, content: memoryview) -> int:
        """How many bytes can be written from where they lie."""
        if not self.is_direct:
            return len(content)
        address: int = np.frombuffer(content, np.uint8).ctypes.data
        return 0 if address % ALIGNMENT else len(content) // ALIGNMENT * ALIGNMENT

    def _empty(self) -> None:
        filled, self._filled = self._filled, 0
        whole = filled // ALIGNMENT * ALIGNMENT
        self._put(self._buffer[:whole])
        if whole < filled:
            self._use_page_cache()
            self._put(self._buffer[whole:filled])

    def _put(self, content: memoryview) -> None:
        while len(content):
            try:
                done = os.write(self._descriptor, content[:_REQUEST])
            except OSError as error:
                if error.errno != errno.EINVAL or not self.is_direct:
                    raise
                self._use_page_cache()  # a file system with larger blocks, or none that does direct I/O
                continue
            content = content[done:]
            if done % ALIGNMENT:
                self._use_page_cache()

    def _use_page_cache(self) -> None:
        if self.is_direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self.is_direct = False
