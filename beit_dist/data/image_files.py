"""The images of one source as a training on images uses them: a list of files, sorted, with a digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from beit_dist.data.image_bytes import read_part
from beit_dist.data.left_out import LeftOut, no_images
from beit_dist.data.listing import expand_sources, list_images
from beit_dist.errors import DataError, StorageError
from beit_dist.storage.access import Access

_SAMPLE = 256
"""Images of which bytes are read for a digest: of fewer, all. At a URL each is a request of every rank."""
_PIECE = 64 << 10
"""Bytes of each, from its middle: those of one format begin alike."""
_AT_ONCE = 32
_VERSION = "2:"
"""What digests begin with; those of old runs are of the sizes alone, and begin with nothing."""


class ImageFile(NamedTuple):
    """Where an image lies: a file, or a range of bytes in a tar."""

    path: str
    """Or URL."""
    offset: int | None
    """None for a file of its own."""
    size: int
    name: str
    """Below the source: the same wherever that lies, and in a tar of it."""

    def __str__(self) -> str:
        """For messages."""
        return self.path if self.offset is None else f"{self.path}, the image at byte {self.offset}"


def find_images(
    images: str, access: Access | None = None, *, sniff: bool = False, left_out: LeftOut | None = None
) -> list[ImageFile]:
    """The images of a folder, a tar or a webdataset specification of tars, here or at URLs, sorted by name.

    Args:
        images: the source.
        access: how URLs are reached.
        sniff: see :func:`beit_dist.data.listing.list_images`.
        left_out: is told of all other files.

    Raises:
        ConfigError, DataError: the source cannot be used, or holds no image.
    """
    left_out = LeftOut() if left_out is None else left_out
    sources = expand_sources([images], access)
    files = []
    for entry in list_images(sources, access, sniff=sniff, left_out=left_out):
        kind, path = sources[entry.source]
        name = os.fsdecode(entry.name)
        if kind == "folder":
            files.append(ImageFile(f"{path.rstrip('/')}/{name}", None, entry.size, name))
        else:
            files.append(ImageFile(path, entry.offset, entry.size, name))
    if not files:
        raise no_images(images, left_out)
    return files


def images_digest(files: Sequence[ImageFile], access: Access) -> str:
    """Of names, sizes and a sample of the bytes: other images, in number or content, have another.

    Bytes are read of at most 256 images, spread evenly over the list, and 64 KiB from the middle of each.

    Raises:
        DataError: an image cannot be read.
    """
    count = min(_SAMPLE, len(files))
    sample = [files[number * len(files) // count] for number in range(count)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(b"%d %d " % (file.size, len(os.fsencode(file.name))) + os.fsencode(file.name))
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for piece in threads.map(lambda file: _middle(file, access), sample):
            digest.update(piece)
    return _VERSION + digest.hexdigest()


def is_of_sizes(digest: str) -> bool:
    """Whether an old version has made a digest."""
    return not digest.startswith(_VERSION)


def sizes_digest(files: Sequence[ImageFile]) -> str:
    """What was taken for the digest by runs of old."""
    return hashlib.sha256(np.array([file.size for file in files], dtype="<i8").tobytes()).hexdigest()


def _middle(file: ImageFile, access: Access) -> bytes:
    count = min(file.size, _PIECE)
    try:
        return read_part(file.path, (file.offset or 0) + (file.size - count) // 2, count, access)
    except StorageError:
        raise
    except EOFError:
        raise DataError(f"{file}: became shorter since the start. Put the old file back") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
