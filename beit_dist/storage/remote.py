"""A place at a URL: whatever fsspec reaches, and what S3 and web servers have in common with that."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.spec import AbstractBufferedFile

from beit_dist.errors import AccessError, ConfigError, StorageError
from beit_dist.storage.access import Access
from beit_dist.storage.listings import folder_files
from beit_dist.storage.place import Buffer, Place, shown
from beit_dist.storage.retries import ShortReadError, retrying

_Result = TypeVar("_Result")
_PART = 16 << 20
"""Bytes of one part of an upload."""

_systems: dict[tuple[int, str, int], Any] = {}
_lock = threading.Lock()


class RemotePlace(Place):
    """A folder at ``url``; see :class:`Place`. A store that fsspec does not do justice to has a class of its own.

    The client is opened by the process that uses it, at the first use: what was opened before a fork hangs.

    Attributes:
        scheme: of the URL.
        address: what follows the scheme: host or bucket, and path.
        access: how the store is reached.
    """

    def __init__(self, url: str, access: Access) -> None:
        self._url, self.access = url.rstrip("/"), access
        self.scheme, _, self.address = self._url.partition("://")

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self._url).path).name or urlsplit(self._url).netloc

    def __str__(self) -> str:
        return shown(self._url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePlace) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    @property
    def parent(self) -> RemotePlace:
        return type(self)(self._url.rpartition("/")[0], self.access)

    def __truediv__(self, name: str) -> RemotePlace:
        return type(self)(self._key(name), self.access)

    def make(self) -> None:
        """Nothing, as a store has no folders; where nothing can be written this is the time to say so."""

    def list(self, name: str = "") -> list[str]:
        folder = self._key(name)
        try:
            found = self._try(lambda fs: fs.ls(folder, detail=False), folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {PurePosixPath(str(path)).name for path in found}
        return sorted(names - {"", PurePosixPath(urlsplit(folder).path).name})

    def files(self) -> Iterator[tuple[str, int]]:
        root: str = self.system()._strip_protocol(self._url)

        def ls(folder: str) -> list[dict[str, Any]]:
            entries: list[dict[str, Any]] = self._try(lambda fs: fs.ls(folder, detail=True), folder)
            return entries

        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield from folder_files(ls, root.rstrip("/"))

    def size(self, name: str) -> int:
        key = self._key(name)
        size = self._try(lambda fs: fs.info(key), key)["size"]
        if size is None:
            raise OSError(f"{shown(key)}: the server does not tell its size")
        return int(size)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        found = self._listed({*map(_folder_of, names)}) if self.can_list else {}
        found = {name: found[name] for name in names if name in found}
        asked = [name for name in names if name not in found]

        def ask(name: str) -> int | None:
            try:
                return self.size(name)
            except (FileNotFoundError, NotADirectoryError):
                return None

        with ThreadPoolExecutor(self.access.connections, "sizes") as pool:
            answers = zip(asked, pool.map(ask, asked), strict=True)
            return found | {name: size for name, size in answers if size is not None}

    def _listed(self, folders: set[str]) -> dict[str, int]:
        """Sizes of all files directly in ``folders`` as far as the lists say: a request for each 1,000 of them."""
        sizes: dict[str, int] = {}
        for folder in sorted(folders):
            key = self._key(folder)
            # One may be allowed to read files and yet not to list them: then each is asked for.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, AccessError):
                for entry in self._try(partial(_details, key), key):
                    if entry.get("type") == "file" and entry.get("size") is not None:
                        sizes[str(PurePosixPath(folder) / PurePosixPath(entry["name"]).name)] = int(entry["size"])
        return sizes

    def read(self, name: str) -> bytes:
        key = self._key(name)
        content: bytes = self._try(lambda fs: fs.cat_file(key), key)
        return content

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read_range(name, offset, len(buffer))

    def read_range(self, name: str, offset: int, size: int) -> Buffer:
        key = self._key(name)

        def read(fs: Any) -> bytes:
            content = self.read_once(fs, key, offset, size)
            if len(content) == size:
                return content
            # A range past the end comes back short, and a server that ignores ranges sends the whole file.
            length = int(fs.info(key)["size"] or 0)
            if offset + size > length:
                raise _TooFarError(f"{shown(key)}: byte {offset}: expected {size} bytes, the file has {length}")
            raise ShortReadError(f"got {len(content)} bytes, expected {size}")

        if not size:
            return b""
        try:
            return self._try(read, key)
        except _TooFarError as error:
            raise EOFError(str(error)) from None

    def write(self, name: str, content: bytes) -> None:
        key = self._key(name)
        self._try(lambda fs: fs.pipe_file(key, content), key)

    def create(self, name: str, content: bytes) -> bool:
        key = self._key(name)
        try:
            self._try(lambda fs: fs.pipe_file(key, content, mode="create"), key)
        except NotImplementedError:
            raise ConfigError(
                "url", str(self), "a store that can refuse to replace a file (a conditional PUT)"
            ) from None
        except StorageError:
            raise
        except OSError as error:
            # Stores other than AWS do not say which condition failed, and s3fs then reports an invalid argument.
            # An answer that was lost looks like a file of somebody else's, too: the content tells.
            try:
                return self.read(name) == content
            except FileNotFoundError:
                raise error from None
        return True

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        key = self._key(name)
        file = self._try(lambda fs: fs.open(key, "wb", block_size=_PART), key)
        try:
            yield file
        except BaseException:
            with contextlib.suppress(Exception):  # close() would make the half file a whole one
                file.discard()
            if isinstance(file, AbstractBufferedFile):
                file.closed = True
            else:  # memory:// has the file from its opening on
                self.remove(name)
            raise
        file.close()

    def remove(self, name: str) -> None:
        key = self._key(name)
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda fs: fs.rm_file(key), key)

    def remove_folder(self, name: str) -> None:
        key = self._key(name)
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda fs: fs.rm(key, recursive=True), key)

    def _key(self, name: str) -> str:
        return f"{self._url}/{name}" if name else self._url

    def _try(self, action: Callable[[Any], _Result], key: str) -> _Result:
        return retrying(partial(action, self.system()), shown(key), self.access.retry_seconds)

    def system(self) -> Any:
        """The fsspec file system of this process."""
        mark = (os.getpid(), self.scheme, hash(repr(self.access)))
        with _lock:
            if mark not in _systems:
                _systems[mark] = self.open_system()
            return _systems[mark]

    def open_system(self) -> Any:
        """A new file system of fsspec, which must not list from memory.

        Raises:
            ConfigError: an argument is missing, unknown or wrong.
        """
        options = self.options()
        try:
            return fsspec.filesystem(self.scheme, use_listings_cache=False, **options)
        except (TypeError, ValueError, ImportError) as error:
            expected = f"options that fsspec accepts ({error})"
            raise ConfigError(f"storage.options.{self.scheme}", options, expected) from None

    def options(self) -> dict[str, Any]:
        """What fsspec's file system is opened with."""
        return dict(self.access.options.get(self.scheme, {}))

    def read_once(self, system: Any, url: str, offset: int, size: int) -> bytes:
        """``size`` bytes of the file at ``url`` from ``offset`` on, or as many of them as it has; one attempt."""
        # By name: the second position of s3fs's cat_file is a version id.
        content: bytes = system.cat_file(url, start=offset, end=offset + size)
        return content


def _details(folder: str, fs: Any) -> Any:
    return fs.ls(folder, detail=True)


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


class _TooFarError(FileNotFoundError):
    """A range beyond the end of a file: no retry makes it longer."""
