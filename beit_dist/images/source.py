"""A source of images: what a user names by one path or URL, and all that has to be known about its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

from beit_dist.errors import DataError, StorageError
from beit_dist.images.gathering import Entry, Gathered
from beit_dist.storage.access import Access


@dataclass(frozen=True)
class Source(ABC):
    """One source. Its kind and its path are its identity: it is compared, pickled and written down by them.

    A kind is a subclass and a line in :data:`beit_dist.images.sources.table.SOURCES`.

    Args:
        path: absolute path or URL.
    """

    path: str

    kind: ClassVar[str]
    """Its name in frozen lists, which must never change."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """What its files are called: at a URL the name alone decides. None for a folder."""
    position: ClassVar[tuple[str, ...]] = ()
    """What the numbers of ``Entry.at`` are called in frozen lists."""

    @classmethod
    def recognises(cls, file: BinaryIO) -> bool:
        """Whether a file, read from its start, is such a source."""
        return False

    @property
    def sniffs_on_request(self) -> bool:
        """Whether files are looked into only where the user asks for it, as that is expensive."""
        return False

    @abstractmethod
    def search(self, found: Gathered, access: Access) -> None:
        """Tell ``found`` of everything that the source holds, images or not.

        Raises:
            DataError: the source is damaged or cannot be listed.
            ConfigError: it is one that cannot be read.
        """

    @abstractmethod
    def read(self, entry: Entry, access: Access) -> bytes:
        """The bytes of an image. Safe in any number of threads.

        Raises:
            ChangedError: another image is there than when the source was listed.
            ImageRejectedError: the archive's own checks say that the bytes are damaged.
            FileNotFoundError: the file is gone.
            StorageError: a store failed for as long as it was tried again.
            OSError: it cannot be read.
        """

    def read_middle(self, entry: Entry, size: int, access: Access) -> bytes:
        """Up to ``size`` bytes from the middle of an image; raises what :meth:`read` does."""
        raw = self.read(entry, access)
        count = min(len(raw), size)
        start = (len(raw) - count) // 2
        return raw[start : start + count]

    def file_of(self, entry: Entry) -> str:
        """Path or URL of the file that holds an image."""
        return self.path

    def where(self, entry: Entry) -> str:
        """The place of an image, for messages."""
        return f"{self.path}, {entry.text}"


@contextmanager
def searched(path: str, *damage: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong while an archive is searched into an error for the user.

    Raises:
        DataError: one of ``damage`` was raised, or an OSError other than a StorageError.
    """
    try:
        yield
    except damage as error:
        raise DataError(f"{path}: damaged or cut short ({first_line(error)}). Copy it again") from None
    except StorageError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0].rstrip(".")
