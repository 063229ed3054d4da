"""A place in the local file system, network mounts included."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from beit_dist.storage.access import Access
from beit_dist.storage.direct import DirectFile
from beit_dist.storage.durable import write_once, write_whole, writing
from beit_dist.storage.place import Place


@dataclass(frozen=True)
class LocalPlace(Place):
    """A folder; see :class:`Place`."""

    folder: Path

    @classmethod
    def at(cls, where: str, access: Access) -> LocalPlace:
        """The folder at a path or a ``file://`` URL."""
        return cls(Path(where.removeprefix("file://")))

    @property
    def name(self) -> str:
        return self.folder.name

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def parent(self) -> LocalPlace:
        return LocalPlace(self.folder.parent)

    def __truediv__(self, name: str) -> LocalPlace:
        return LocalPlace(self.folder / name)

    @property
    def is_local(self) -> bool:
        return True

    @property
    def path(self) -> Path:
        return self.folder

    def make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def list(self, name: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.folder / name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def files(self) -> Iterator[tuple[str, int]]:
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield path.relative_to(self.folder).as_posix(), path.stat().st_size

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        with open(self.folder / name, "rb", buffering=0) as file:
            got = 0
            while got < len(buffer):
                count = os.preadv(file.fileno(), [buffer[got:]], offset + got)
                if not count:
                    raise EOFError(f"{self.folder / name}: byte {offset}: got {got} bytes, expected {len(buffer)}")
                got += count

    def write(self, name: str, content: bytes) -> None:
        write_whole(self.folder / name, content)

    def create(self, name: str, content: bytes) -> bool:
        return write_once(self.folder / name, content)

    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        return writing(self.folder / name, lambda path: cast(BinaryIO, DirectFile(path)))

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder / name)
