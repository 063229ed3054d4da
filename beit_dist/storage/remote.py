"""A place at a URL: an object store, a web server, or whatever else fsspec reaches."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.spec import AbstractBufferedFile

from beit_dist.errors import AccessError, ConfigError, StorageError
from beit_dist.storage.access import Access
from beit_dist.storage.http_ranges import read_http_range
from beit_dist.storage.listings import folder_files, s3_files
from beit_dist.storage.place import Buffer, Place, shown
from beit_dist.storage.retries import ShortReadError, retrying
from beit_dist.storage.uploads import S3Upload

_Result = TypeVar("_Result")
_S3 = ("s3", "s3a")
_HTTP = ("http", "https")  # fsspec takes the links of a page for a list, which has no sizes
_PART = 16 << 20
"""Bytes of one part of an upload to a store other than S3."""

_systems: dict[tuple[int, str, int], Any] = {}
_lock = threading.Lock()


class RemotePlace(Place):
    """A folder at ``url``; see :class:`Place`.

    The client is opened by the process that uses it, at the first use: what was opened before a fork hangs.
    """

    def __init__(self, url: str, access: Access) -> None:
        self._url, self._access = url.rstrip("/"), access

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
        return RemotePlace(self._url.rpartition("/")[0], self._access)

    def __truediv__(self, name: str) -> RemotePlace:
        return RemotePlace(self._key(name), self._access)

    def make(self) -> None:
        """Nothing, as a store has no folders; where nothing can be written this is the time to say so.

        Raises:
            ConfigError: the URL is a web server's.
        """
        if urlsplit(self._url).scheme in _HTTP:
            raise ConfigError("url", str(self), "a folder or an object store", "Web servers take no files.")

    def list(self, name: str = "") -> list[str]:
        folder = self._key(name)
        try:
            found = self._try(lambda fs: fs.ls(folder, detail=False), folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {PurePosixPath(str(path)).name for path in found}
        return sorted(names - {"", PurePosixPath(urlsplit(folder).path).name})

    def files(self) -> Iterator[tuple[str, int]]:
        if urlsplit(self._url).scheme in _S3:
            bucket, _, key = self._url.partition("://")[2].partition("/")
            yield from s3_files(self.system(), bucket, f"{key}/" if key else "")
            return
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
            raise OSError(f"{shown(key)}: the server does not say how large it is")
        return int(size)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        found = {} if urlsplit(self._url).scheme in _HTTP else self._listed({*map(_folder_of, names)})
        found = {name: found[name] for name in names if name in found}
        asked = [name for name in names if name not in found]

        def ask(name: str) -> int | None:
            try:
                return self.size(name)
            except (FileNotFoundError, NotADirectoryError):
                return None

        with ThreadPoolExecutor(self._access.connections, "sizes") as pool:
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
        on_the_web = urlsplit(key).scheme in _HTTP

        def read(fs: Any) -> bytes:
            # By name: the second position of s3fs's cat_file is a version id.
            content: bytes = (
                read_http_range(fs, key, offset, size)
                if on_the_web
                else fs.cat_file(key, start=offset, end=offset + size)
            )
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
                "url", str(self), "a store that can create a file only if there is none (a conditional PUT)"
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
        if urlsplit(self._url).scheme in _S3:
            upload = S3Upload(self.system(), *key.partition("://")[2].split("/", 1))
            try:
                yield cast(BinaryIO, upload)
                upload.complete()
            except BaseException:
                upload.abort()
                raise
            return
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
        return retrying(partial(action, self.system()), shown(key), self._access.retry_seconds)

    def system(self) -> Any:
        """The fsspec file system of this process."""
        protocol = urlsplit(self._url).scheme
        mark = (os.getpid(), protocol, hash(repr(self._access)))
        with _lock:
            if mark not in _systems:
                _systems[mark] = _open(protocol, self._access, str(self))
            return _systems[mark]


def _details(folder: str, fs: Any) -> Any:
    return fs.ls(folder, detail=True)


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


class _TooFarError(FileNotFoundError):
    """A range beyond the end of a file: no retry makes it longer."""


def _open(protocol: str, access: Access, where: str) -> Any:
    if protocol in _S3:
        from beit_dist.storage.s3 import open_s3

        return open_s3(access)
    options = dict(access.options.get(protocol, {}))
    if protocol in _HTTP:
        options["client_kwargs"] = {"timeout": _http_timeout(access), **options.get("client_kwargs", {})}
    try:
        return fsspec.filesystem(protocol, use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            "url", where, "a protocol that fsspec knows and whose package is installed", str(error)
        ) from None
    except TypeError as error:  # of Python: an argument of its file system is missing, or unknown
        raise ConfigError(f"storage.options.{protocol}", options, f"its settings ({error})") from None


def _http_timeout(access: Access) -> Any:
    """aiohttp's own limit is five minutes for a whole answer, however fast it comes in."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=access.connect_seconds, sock_read=access.read_seconds)
