"""A place where files lie: a local folder, or anything that fsspec reaches by a URL.

What a file system promises differs: a folder has renames and links, an object store conditional PUTs. Here they
promise the same: a file appears whole or not at all, and of several processes that create a name one succeeds.
"""

from __future__ import annotations

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from beit_dist.errors import ConfigError

READ_CHUNK = 8 << 20
"""Bytes of one request when a whole file is read; AWS advises ranges of 8 to 16 MiB."""

Buffer = bytes | bytearray
"""What a file's content comes in."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[a-z0-9]+::|pipe:")


class Place(ABC):
    """A folder; names in it are relative and have ``/`` between their parts. Can be pickled.

    Methods raise ``FileNotFoundError`` for what is not there and other ``OSError`` for what fails for good; a
    place at a URL has tried again until its time limit by then.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Last part of the path."""

    @abstractmethod
    def __str__(self) -> str:
        """Path or URL, without credentials."""

    @property
    @abstractmethod
    def parent(self) -> Place:
        """The folder around this one."""

    @abstractmethod
    def __truediv__(self, name: str) -> Place:
        """The folder ``name`` in this one."""

    @property
    def is_local(self) -> bool:
        """Whether :attr:`path` is a path that other programs can open."""
        return False

    takes_files = True
    """Whether files can be written."""
    can_list = True
    """Whether :meth:`files` finds every file, with its size."""

    @property
    def path(self) -> Path:
        """The folder's path.

        Raises:
            ConfigError: it is at a URL.
        """
        raise ConfigError(self.name, str(self), "a local folder")

    @abstractmethod
    def make(self) -> None:
        """Create the folder and those around it, where the file system has folders."""

    @abstractmethod
    def list(self, name: str = "") -> list[str]:
        """Sorted names of what is directly in this folder, or in its folder ``name``; none is no error."""

    @abstractmethod
    def files(self) -> Iterator[tuple[str, int]]:
        """(path in this folder, bytes) of every file in it and below, in no particular order; none is no error."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of each of these files that is there; many at once, with as few requests as there need be."""
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found[name] = self.size(name)
        return found

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        try:
            self.size(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file's content."""

    @abstractmethod
    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the file's bytes from ``offset`` on.

        Raises:
            EOFError: the file ends before that.
        """

    def read_range(self, name: str, offset: int, size: int) -> Buffer:
        """``size`` bytes of the file from ``offset`` on.

        Raises:
            EOFError: the file ends before that.
        """
        content = bytearray(size)
        self.read_into(name, offset, memoryview(content))
        return content

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The whole file, in pieces of 8 MiB that are valid until the next one is asked for."""
        left, offset = self.size(name), 0
        memory = memoryview(bytearray(min(left, READ_CHUNK)))
        while left:
            piece = memory[: min(left, READ_CHUNK)]
            self.read_into(name, offset, piece)
            yield piece
            left, offset = left - len(piece), offset + len(piece)

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole and durable; one of that name is replaced."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a small file unless there is one of that name; of several processes one succeeds. Returns whether.

        ``content`` must not be what another process might create: it tells whose file is there. Stores whose
        check is not one with the write (OpenStack Swift) let several succeed that ask within milliseconds, and
        the last one's content stays: look again before anything is done that only one may do.
        """

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Write a large file; it is there, whole and durable, when the block ends, and not if the block raises."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; none is no error."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Remove a folder in this one and all that it holds; none is no error."""


def is_url(where: str | os.PathLike[str]) -> bool:
    """Whether ``where`` names something other than a local path."""
    return _SCHEME.match(str(where)) is not None and not str(where).startswith("file:")


def shown(url: str) -> str:
    """A URL as messages and files may have it: without user, password and query, which can hold credentials."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
