"""Images of classes: found in any source, with their labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beit_dist.errors import ConfigError, DataError, printable
from beit_dist.images.file_kinds import folder_kind
from beit_dist.images.files import ImageFile, images_digest
from beit_dist.images.gathering import Entry
from beit_dist.images.labelled.csv_files import is_csv, listed_in
from beit_dist.images.labelled.file_table import FileTable
from beit_dist.images.left_out import LeftOut, no_images
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.images.own_output import SHARDS, ours
from beit_dist.images.source import Source
from beit_dist.images.sources.folder import Folder
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place

_NAMED = 3
"""Classes or files that a message names."""
_MAKE_CLASSES = "Put each image into a folder named after its class, or give a CSV with the header path,label"


@dataclass(frozen=True)
class LabelledImages:
    """Images and the class of each."""

    files: Sequence[ImageFile]
    """Sorted by name."""
    labels: NDArray[np.int64]
    """``(n,)``: the number of each image's class in ``classes``."""
    classes: tuple[str, ...]
    """Names, sorted as plain strings."""
    digest: str
    """Of files, labels and names; see :func:`beit_dist.images.files.images_digest`."""

    def __len__(self) -> int:
        return len(self.files)

    def counts(self) -> NDArray[np.int64]:
        """``(classes,)``: images of each class."""
        return np.bincount(self.labels, minlength=len(self.classes))


def find_labelled(
    specs: str | Sequence[str],
    access: Access,
    *,
    classes: Sequence[str] | None = None,
    field: str = "data",
    left_out: LeftOut | None = None,
) -> LabelledImages:
    """The images of one or several sources with their classes.

    An image's class is what its source says (parquet's column ``label``; ``.cls`` or ``.json`` beside it in a tar;
    the second column of a CSV), or else the name of the folder it lies in.

    Args:
        specs: sources, as :func:`beit_dist.images.listing.expand_sources` takes them, or ``.csv`` files.
        access: how URLs are reached.
        classes: the classes there can be, in their order; None takes those of the images, sorted.
        field: the setting that names the sources, for messages.
        left_out: collects what is said of all other files.

    Raises:
        ConfigError: a source cannot be used, or holds shards of ours.
        DataError: one is damaged; there is no image, an image without a class, one class only, an empty folder
            beside the classes, or a class that is not in ``classes``.
    """
    named = [specs] if isinstance(specs, str) else list(specs)
    left_out = LeftOut() if left_out is None else left_out
    try:
        sources, entries = _listed(named, access, left_out)
    except ConfigError as error:  # which knows the commands' option only
        raise error.named(field) from None
    if not entries:
        raise no_images(f"{field}: {' '.join(named)}", left_out)
    found = sorted({entry.class_name for entry in entries})
    if "" in found:
        raise _without_class(field, sources, entries)
    if classes is None:
        _check_empty(field, sources, entries)
        if len(found) == 1:
            raise DataError(
                f"{field}: got one class only, {printable(found[0])}, expected two or more. Name the "
                "folder in which the folders of all classes lie"
            )
    known = tuple(found if classes is None else classes)
    numbers = {name: number for number, name in enumerate(known)}
    if unknown := set(found) - set(numbers):
        raise _unknown(field, sources, entries, unknown)
    labels = np.array([numbers[entry.class_name] for entry in entries], dtype=np.int64)
    files = FileTable(sources, entries)
    return LabelledImages(files, labels, known, _digest(images_digest(files, access), known, labels))


def _listed(named: list[str], access: Access, left_out: LeftOut) -> tuple[tuple[Source, ...], list[Entry]]:
    """Sources and what they hold, sorted."""
    sources = expand_sources([spec for spec in named if not is_csv(spec)], access)
    for source in sources:
        _refuse_shards(source, access)
    entries = list_images(sources, access, left_out=left_out, labels=True)
    for spec in filter(is_csv, named):
        folder, rows = listed_in(spec, len(sources), access)
        sources, entries = (*sources, folder), [*entries, *rows]
    return sources, sorted(entries)


def _refuse_shards(source: Source, access: Access) -> None:
    if not isinstance(source, Folder):
        return
    place = open_place(source.path, access)
    if ours(frozenset(place.list())) is SHARDS:
        raise ConfigError(
            "data",
            source.path,
            "labelled images: shards hold views and tokens, in no size but their own",
            "Name the images from which they were made.",
        )


def _without_class(field: str, sources: Sequence[Source], entries: Sequence[Entry]) -> DataError:
    without = [entry for entry in entries if not entry.class_name]
    first = sources[without[0].source].where(without[0])
    some = f"{len(without):,} of {len(entries):,} images" if len(without) < len(entries) else "images"
    return DataError(f"{field}: {some} have no class ({printable(first)}). {_MAKE_CLASSES}")


def _unknown(field: str, sources: Sequence[Source], entries: Sequence[Entry], unknown: set[str]) -> DataError:
    """The error for classes that the other data has not: they can be neither learnt nor measured."""
    example = next(entry for entry in entries if entry.class_name in unknown)
    names = ", ".join(map(printable, sorted(unknown)[:_NAMED])) + (", …" if len(unknown) > _NAMED else "")
    classes = "the class" if len(unknown) == 1 else f"{len(unknown)} classes"
    return DataError(
        f"{field}: got {classes} {names}, which the training data does not have: "
        f"{printable(sources[example.source].where(example))}. Remove these images, or rename their class"
    )


def _check_empty(field: str, sources: Sequence[Source], entries: Sequence[Entry]) -> None:
    """A folder with nothing in it, beside those of the classes, is a class whose images are missing."""
    beside = {(e.source, os.path.dirname(os.path.dirname(e.text))) for e in entries if e.label is None}
    for number, below in sorted(beside):
        source = sources[number]
        path = os.path.join(source.path, below)
        if not isinstance(source, Folder) or not os.path.isdir(path):
            continue
        for item in sorted(os.scandir(path), key=lambda item: item.name):
            if item.is_dir() and not folder_kind(item.name) and not any(os.scandir(item.path)):
                raise DataError(
                    f"{field}: {printable(item.path)}: an empty folder among the classes. Put its images "
                    "there, or remove it"
                )


def _digest(images: str, classes: Sequence[str], labels: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(images.encode())
    for name in classes:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(labels.astype("<i8", copy=False).tobytes())
    return digest.hexdigest()
