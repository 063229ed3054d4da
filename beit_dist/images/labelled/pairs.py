"""Images and label maps of the same name: ``images/a/b.jpg`` and ``labels/a/b.png``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from beit_dist.errors import DataError, StorageError, printable
from beit_dist.images.files import ImageFile
from beit_dist.images.gathering import Entry
from beit_dist.images.labelled.file_table import FileTable
from beit_dist.images.left_out import Kind, LeftOut, no_images
from beit_dist.images.listing import expand_sources, list_images
from beit_dist.images.source import Source
from beit_dist.images.sources.folder import Folder
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place

_IMAGES = "images"
_MAPS = ("labels", "annotations")
"""What the folder of label maps may be called: ``annotations`` is ADE20K's."""
_LAYOUT = "images/ and, with the same names, PNG maps in labels/"
_ELSEWHERE = Kind("image in neither images/ nor labels/", "images in neither images/ nor labels/")
_NAMES = "classes.txt"


class _Place(NamedTuple):
    """Where an image or a map belongs."""

    is_map: bool
    key: tuple[int, str]
    """The same for both of a pair."""


def find_pairs(
    named: Sequence[str], access: Access, left_out: LeftOut
) -> tuple[Sequence[ImageFile], Sequence[ImageFile]]:
    """Images, sorted by name, and the map of each.

    Args:
        named: sources; each holds folders ``images`` and ``labels``, or is a folder below one called ``images``.
        access: how URLs are reached.
        left_out: collects what is said of all other files.

    Raises:
        ConfigError: a source cannot be used.
        DataError: there is none, one of a pair is missing, or two have the same name.
    """
    sources, sides = _sources(named, access)
    images: dict[tuple[int, str], Entry] = {}
    maps: dict[tuple[int, str], Entry] = {}
    for entry in list_images(sources, access, left_out=left_out):
        place = _place(entry, sides)
        if place is None:
            left_out.add(_ELSEWHERE, 1, entry.text)
            continue
        side = maps if place.is_map else images
        if place.key in side:
            first, second = (_shown(sources, one) for one in (side[place.key], entry))
            raise DataError(f"{first} and {second} have the same name. Rename or remove one of them")
        side[place.key] = entry
    if not images and not maps:
        raise no_images(f"{' '.join(named)}: expected {_LAYOUT}", left_out)
    _check_pairs(sources, images, maps, "images", "label map")
    _check_pairs(sources, maps, images, "label maps", "image")
    return FileTable(sources, [*images.values()]), FileTable(sources, [maps[key] for key in images])


def class_names(named: Sequence[str], access: Access) -> tuple[str, ...]:
    """The lines of ``classes.txt`` in or beside the sources; empty where there is none.

    Raises:
        DataError: two such files differ, or one names a class twice.
    """
    found: dict[tuple[str, ...], str] = {}
    for root in dict.fromkeys(root for spec in named for root in _roots(spec, access)):
        try:
            text = open_place(root, access).read(_NAMES).decode("utf-8-sig")
        except StorageError:
            raise
        except (OSError, UnicodeDecodeError):
            continue
        found.setdefault(tuple(line.strip() for line in text.strip().splitlines()), f"{root}/{_NAMES}")
    if len(found) > 1:
        raise DataError(f"{' and '.join(found.values())} differ. All sources must have the same classes")
    names = next(iter(found), ())
    if len(set(names)) < len(names) or "" in names:
        raise DataError(f"{found[names]}: expected a name in each line, each only once")
    return names


def _sources(named: Sequence[str], access: Access) -> tuple[list[Source], list[tuple[int, bool] | None]]:
    """All sources; of each, None, or the group that it is in, and whether it holds the maps of that group."""
    sources: list[Source] = []
    sides: list[tuple[int, bool] | None] = []
    for number, spec in enumerate(named):
        beside = _maps_beside(spec, access)
        for path, is_map in [(spec, False)] if beside is None else [(spec, False), (beside, True)]:
            for source in expand_sources([path], access):
                sources.append(source)
                sides.append(None if beside is None else (-1 - number, is_map))  # no source has such a number
    return sources, sides


def _maps_beside(spec: str, access: Access) -> str | None:
    """The folder of maps for a folder of images: ``…/labels/train`` for ``…/images/train``; None without one."""
    parts = spec.rstrip("/").split("/")
    if _IMAGES not in parts:
        return None
    at = len(parts) - 1 - parts[::-1].index(_IMAGES)
    for name in _MAPS:
        path = "/".join([*parts[:at], name, *parts[at + 1 :]])
        if _is_filled(path, access):
            return path
    return None


def _is_filled(path: str, access: Access) -> bool:
    place = open_place(path, access)
    return place.can_list and bool(place.list())


def _roots(spec: str, access: Access) -> Iterator[str]:
    """Folders in which the names of the classes may lie."""
    parts = spec.removeprefix("file://").rstrip("/").split("/")
    if _maps_beside(spec, access) is not None:
        yield "/".join(parts[: len(parts) - 1 - parts[::-1].index(_IMAGES)]) or "."
    else:
        for source in expand_sources([spec], access):
            yield source.path if isinstance(source, Folder) else os.path.dirname(source.path)


def _place(entry: Entry, sides: Sequence[tuple[int, bool] | None]) -> _Place | None:
    name, side = os.path.splitext(entry.text)[0], sides[entry.source]
    if side is not None:
        group, is_map = side
        return _Place(is_map, (group, name))
    parts = name.split("/")
    at = next((at for at, part in enumerate(parts[:-1]) if part == _IMAGES or part in _MAPS), None)
    if at is None:
        return None
    return _Place(parts[at] != _IMAGES, (entry.source, "/".join([*parts[:at], *parts[at + 1 :]])))


def _check_pairs(
    sources: Sequence[Source],
    side: dict[tuple[int, str], Entry],
    other: dict[tuple[int, str], Entry],
    what: str,
    missing: str,
) -> None:
    alone = [entry for key, entry in side.items() if key not in other]
    if alone:
        more = f" and {len(alone) - 1:,} more {what}" if len(alone) > 1 else ""
        verb = "have" if more else "has"
        raise DataError(f"{_shown(sources, alone[0])}{more} {verb} no {missing}. Expected {_LAYOUT}")


def _shown(sources: Sequence[Source], entry: Entry) -> str:
    return printable(f"{sources[entry.source].where(entry)}")
