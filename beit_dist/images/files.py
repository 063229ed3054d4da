"""The images of sources as a training on images uses them: a list of files, sorted, with a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from beit_dist.errors import DataError, StorageError
from beit_dist.images.gathering import Entry
from beit_dist.images.left_out import LeftOut, no_images
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.images.rejection import ChangedError, ImageRejectedError
from beit_dist.images.source import Source
from beit_dist.storage.access import Access

_SAMPLE = 256
"""Images of which bytes are read for a digest: of fewer, all. At a URL each is a request of every rank."""
_PIECE = 64 << 10
"""Bytes of each, from its middle: those of one format begin alike."""
_AT_ONCE = 32
_VERSION = "2:"
"""What digests begin with; those of old runs are of the sizes alone, and begin with nothing."""


class ImageFile(NamedTuple):
    """An image of one of several sources."""

    source: Source
    entry: Entry

    @property
    def size(self) -> int:
        """See :class:`beit_dist.images.gathering.Entry`."""
        return self.entry.size

    @property
    def name(self) -> str:
        """Below the source: the same wherever that lies, and in a tar of it."""
        return self.entry.text

    def read(self, access: Access) -> bytes:
        """Its bytes.

        Raises:
            ImageRejectedError: they are damaged.
            DataError: it is not what was listed, or cannot be read.
            StorageError: a store failed for as long as it was tried again.
        """
        with self.errors():
            return self.source.read(self.entry, access)

    def read_middle(self, size: int, access: Access) -> bytes:
        """Up to ``size`` bytes from its middle, or why it is rejected; raises what :meth:`read` does otherwise."""
        try:
            with self.errors():
                return self.source.read_middle(self.entry, size, access)
        except ImageRejectedError as error:
            return str(error).encode()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what its source raises while it is read into what :meth:`read` raises."""
        try:
            yield
        except ChangedError as error:
            raise DataError(f"{self}: changed since the start ({error}). Put the old file back") from None
        except StorageError:
            raise
        except OSError as error:
            raise DataError(f"{self}: cannot be read ({error.strerror or error})") from None

    def __str__(self) -> str:
        """For messages."""
        return self.source.where(self.entry)


def find_images(
    images: str | Sequence[str],
    access: Access | None = None,
    *,
    sniff: bool = False,
    left_out: LeftOut | None = None,
) -> list[ImageFile]:
    """The images of one or several sources, sorted by name.

    Args:
        images: the sources, as :func:`beit_dist.images.listing.expand_sources` takes them.
        access: how URLs are reached.
        sniff: see :func:`beit_dist.images.listing.list_images`.
        left_out: collects what is said of all other files.

    Raises:
        ConfigError, DataError: a source cannot be used, or none holds an image.
    """
    left_out = LeftOut() if left_out is None else left_out
    named = [images] if isinstance(images, str) else images
    sources = expand_sources(named, access)
    entries = list_images(sources, access, sniff=sniff, left_out=left_out)
    if not entries:
        raise no_images(" ".join(named), left_out)
    return [ImageFile(sources[entry.source], entry) for entry in entries]


def images_digest(files: Sequence[ImageFile], access: Access) -> str:
    """A digest of names, sizes and a sample of the bytes: it differs if the number or the content of the images
    does.

    At most 256 images, spread evenly over the list, are read: 64 KiB from the middle of each.

    Raises:
        DataError: an image cannot be read.
    """
    count = min(_SAMPLE, len(files))
    sample = [files[number * len(files) // count] for number in range(count)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(b"%d %d " % (file.size, len(file.entry.name)) + file.entry.name)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for piece in threads.map(lambda file: file.read_middle(_PIECE, access), sample):
            digest.update(piece)
    return _VERSION + digest.hexdigest()


def is_of_sizes(digest: str) -> bool:
    """Whether an old version made this digest."""
    return not digest.startswith(_VERSION)


def sizes_digest(files: Sequence[ImageFile]) -> str:
    """The digest that old versions used."""
    return hashlib.sha256(np.array([file.size for file in files], dtype="<i8").tobytes()).hexdigest()
