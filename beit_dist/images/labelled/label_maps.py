"""Images of a segmentation and their label maps, in pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from beit_dist.config.labelled import LabelMapsConfig
from beit_dist.errors import ConfigError, DataError, printable
from beit_dist.images.decoding import Pixels
from beit_dist.images.files import ImageFile, images_digest
from beit_dist.images.labelled.pairs import class_names, find_pairs
from beit_dist.images.labelled.reading import read_image, read_map, shown
from beit_dist.images.left_out import LeftOut
from beit_dist.storage.access import Access

IGNORED = 255
"""What a pixel without a class is in batches, whatever number the files have for it."""
MOST_CLASSES = 255
_AT_ONCE = 8
"""Label maps that are decoded side by side."""


@dataclass(frozen=True)
class LabelMaps:
    """Images and the label map of each."""

    files: Sequence[ImageFile]
    """The images, sorted by name."""
    maps: Sequence[ImageFile]
    """The label map of each image."""
    classes: tuple[str, ...]
    """Names in the order of their numbers; at most 255."""
    first: int
    """The number that the first class has in the maps."""
    ignore_label: int | None
    """The number of pixels without a class in the maps."""
    digest: str
    """Of images, maps, names and numbers."""

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int, access: Access) -> tuple[Pixels, Pixels]:
        """Image and map: uint8 (H, W, 3), and uint8 (H, W) with the number of each pixel's class or 255.

        Raises:
            DataError: one is damaged or gone, the sizes differ, or the map holds a number of no class. It names
                the file, and the number.
            StorageError: a store failed for as long as it was tried again.
        """
        pixels, labels = np.asarray(read_image(self.files[number], access)), self.read_map(number, access)
        if pixels.shape[:2] != labels.shape:
            (height, width), (expected_height, expected_width) = labels.shape, pixels.shape[:2]
            raise DataError(
                f"{shown(self.maps[number])}: got {width}×{height} px, expected {expected_width}×"
                f"{expected_height} px, as its image {shown(self.files[number])} has"
            )
        return pixels, labels

    def read_map(self, number: int, access: Access) -> Pixels:
        """A map alone: uint8 (H, W); raises what :meth:`read` does."""
        numbers = read_map(self.maps[number], access)
        found = self._meanings[numbers]
        if found.min(initial=0) < 0:
            wrong = numbers[found < 0]
            last = self.first + len(self.classes) - 1
            ignored = "" if self.ignore_label is None else f", or {self.ignore_label} for none"
            raise DataError(
                f"{shown(self.maps[number])}: got the number {wrong[0]} ({wrong.size:,} pixels), "
                f"expected a class from {self.first} to {last}{ignored}. Set maps.ids or "
                "maps.ignore_label, or mend the map"
            )
        return found.astype(np.uint8)

    @cached_property
    def _meanings(self) -> NDArray[np.int16]:
        """From the numbers in maps to those of classes, 255, or -1."""
        meanings = np.full(1 << 16, -1, np.int16)
        meanings[self.first : self.first + len(self.classes)] = np.arange(len(self.classes))
        if self.ignore_label is not None:
            meanings[self.ignore_label] = IGNORED
        return meanings


def find_label_maps(
    specs: str | Sequence[str],
    access: Access,
    settings: LabelMapsConfig,
    *,
    classes: Sequence[str] | None = None,
    field: str = "data",
    left_out: LeftOut | None = None,
) -> LabelMaps:
    """The images of one or several sources with their label maps.

    Args:
        specs: sources with ``images/…`` and ``labels/…`` in them, or folders below an ``images`` folder.
        access: how URLs are reached.
        settings: what the numbers in the maps mean.
        classes: names of the classes, by their numbers; None takes ``classes.txt``, or else the numbers.
        field: the setting that names the sources, for messages.
        left_out: collects what is said of all other files.

    Raises:
        ConfigError: a source cannot be used, or settings and names contradict each other.
        DataError: an image has no map, or a map no image; they are named.
    """
    named = [specs] if isinstance(specs, str) else list(specs)
    left_out = LeftOut() if left_out is None else left_out
    try:
        files, maps = find_pairs(named, access, left_out)
        names = class_names(named, access) if classes is None else tuple(classes)
    except ConfigError as error:  # which knows the commands' option only
        raise error.named(field) from None
    first, count = settings.ids[0] if settings.ids else 0, len(names)
    if settings.ids is not None:
        count = settings.ids[1] - first + 1
        if names and len(names) != count:
            raise ConfigError(
                "maps.ids", settings.ids, f"as many numbers as there are names of classes ({len(names)})"
            )
    elif not names:
        count = _counted(field, maps, settings.ignore_label, access)
    names = names or tuple(str(first + number) for number in range(count))
    _check_count(field, first, names, settings.ignore_label)
    digest = hashlib.sha256(images_digest([*files, *maps], access).encode())
    digest.update(repr((first, names, settings.ignore_label)).encode("utf-8", "backslashreplace"))
    return LabelMaps(files, maps, names, first, settings.ignore_label, digest.hexdigest())


def class_pixels(maps: LabelMaps, access: Access, most: int = 256) -> NDArray[np.int64]:
    """``(classes,)``: pixels of each class in at most ``most`` maps, spread evenly over the list.

    Raises:
        DataError: a map cannot be used.
    """
    count = min(most, len(maps))
    numbers = [number * len(maps) // count for number in range(count)]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = threads.map(lambda number: np.bincount(maps.read_map(number, access).ravel(), None, 256), numbers)
        return np.asarray(sum(found), np.int64)[: len(maps.classes)]


def _counted(field: str, maps: Sequence[ImageFile], ignored: int | None, access: Access) -> int:
    """How many classes the maps have, by their largest number."""

    def largest(file: ImageFile) -> int:
        numbers = read_map(file, access)
        return int(numbers[numbers != ignored].max(initial=0)) if ignored is not None else int(numbers.max())

    most, where = -1, ""
    with (
        ThreadPoolExecutor(_AT_ONCE) as threads,
        tqdm(total=len(maps), desc="counting classes", unit=" maps", disable=None) as bar,
    ):
        for file, found in zip(maps, threads.map(largest, maps), strict=True):
            bar.update()
            if found > most:
                most, where = found, shown(file)
    if most >= MOST_CLASSES:
        raise DataError(
            f"{field}: {where}: got the number {most}, expected at most {MOST_CLASSES - 1}. If it "
            f"marks pixels without a class, set maps.ignore_label={most}"
        )
    return most + 1


def _check_count(field: str, first: int, names: Sequence[str], ignored: int | None) -> None:
    if not 2 <= len(names) <= MOST_CLASSES:
        raise DataError(f"{field}: got {len(names)} classes, expected 2 to {MOST_CLASSES}")
    last = first + len(names) - 1
    if ignored is not None and first <= ignored <= last:
        raise ConfigError(
            "maps.ignore_label",
            ignored,
            f"a number outside those of the {len(names)} classes, {first} to {last}",
            f"It is the class {printable(names[ignored - first])}: take it out of classes.txt, or set maps.ids.",
        )
