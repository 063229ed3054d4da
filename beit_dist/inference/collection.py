"""The images that a command looks at: those of its sources, source by source, each by name, with their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beit_dist.images.files import ImageFile, images_digest
from beit_dist.images.labelled.file_table import FileTable
from beit_dist.images.left_out import LeftOut, no_images
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.storage.access import Access


@dataclass(frozen=True)
class Collection:
    """Images by number, from 0 to N - 1. A few hundred bytes of memory for each."""

    files: FileTable
    """First those of the first source, sorted by name, then those of the second."""
    labels: NDArray[np.int32]
    """(N,): the number of an image's class in ``classes``; -1 for none."""
    classes: tuple[str, ...]
    """Two or more, sorted; or none, where the sources do not tell several classes apart."""
    digest: str
    """Of the order, names, sizes and a sample of the bytes; see :func:`beit_dist.images.files.images_digest`."""
    left_out: tuple[str, ...]
    """What was said of all other files."""

    def __len__(self) -> int:
        return len(self.files)

    def label(self, number: int) -> str | None:
        """The class of an image."""
        place = int(self.labels[number])
        return None if place < 0 else self.classes[place]


def find_collection(named: Sequence[str], access: Access, *, sniff: bool = False) -> Collection:
    """The images of sources in the order in which these are named.

    An image's class is what its source says (see :func:`beit_dist.images.labelled.images.find_labelled`), or else
    the name of the folder it lies in.

    Raises:
        ConfigError: a source cannot be used.
        DataError: one is damaged, or none holds an image.
    """
    left_out = LeftOut()
    sources = expand_sources(named, access)
    entries = list_images(sources, access, sniff=sniff, left_out=left_out, labels=True)
    if not entries:
        raise no_images(f"--images {' '.join(named)}", left_out)
    entries.sort(key=lambda entry: entry.source)  # which keeps the order by name in each
    names = [entry.class_name for entry in entries]
    classes = tuple(sorted(set(names) - {""}))
    if len(classes) < 2:
        classes = ()
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers.get(name, -1) for name in names], np.int32)
    files = FileTable(sources, entries)
    return Collection(files, labels, classes, _digest(files, access), tuple(left_out.lines()))


def _digest(files: Sequence[ImageFile], access: Access) -> str:
    return hashlib.sha256(images_digest(files, access).encode()).hexdigest()
