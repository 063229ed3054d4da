"""A store of our own for tests, which neither the package nor fsspec knows: files on a shelf of this process."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

from beit_dist.storage.access import Access
from beit_dist.storage.place import Place

_files: dict[str, bytes] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class ShelfPlace(Place):
    """A folder at ``shelf://...``; see :class:`Place`."""

    url: str
    access: Access = field(compare=False)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    @property
    def parent(self) -> ShelfPlace:
        return ShelfPlace(self.url.rpartition("/")[0], self.access)

    def __truediv__(self, name: str) -> ShelfPlace:
        return ShelfPlace(f"{self.url}/{name}", self.access)

    def make(self) -> None:
        """Nothing: a shelf has no folders."""

    def list(self, name: str = "") -> list[str]:
        folder = self / name if name else self
        return sorted({path.partition("/")[0] for path, _ in folder.files()})

    def files(self) -> Iterator[tuple[str, int]]:
        for path, content in list(_files.items()):
            if path.startswith(f"{self.url}/"):
                yield path[len(self.url) + 1 :], len(content)

    def size(self, name: str) -> int:
        return len(self.read(name))

    def read(self, name: str) -> bytes:
        try:
            return _files[f"{self.url}/{name}"]
        except KeyError:
            raise FileNotFoundError(f"{self.url}/{name}") from None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        part = self.read(name)[offset : offset + len(buffer)]
        if len(part) < len(buffer):
            raise EOFError(f"{self.url}/{name}: byte {offset}: got {len(part)} bytes, expected {len(buffer)}")
        buffer[:] = part

    def write(self, name: str, content: bytes) -> None:
        _files[f"{self.url}/{name}"] = bytes(content)

    def create(self, name: str, content: bytes) -> bool:
        with _lock:
            if f"{self.url}/{name}" in _files:
                return False
            self.write(name, content)
        return True

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        file = io.BytesIO()
        yield file
        self.write(name, file.getvalue())

    def remove(self, name: str) -> None:
        _files.pop(f"{self.url}/{name}", None)

    def remove_folder(self, name: str) -> None:
        for path, _ in (self / name).files():
            with contextlib.suppress(KeyError):
                del _files[f"{self.url}/{name}/{path}"]
