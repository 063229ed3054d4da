"""Finding images: the files below folders and the members of tars, here or at URLs, as users name them."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import urlsplit

import webdataset as wds

from beit_dist.data.image_tars import check_tar, scan_tar
from beit_dist.errors import ConfigError, DataError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import check_place, is_url

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif",
)  # fmt: skip
"""What counts as an image file; upper case too. Whether it is one shows when it is decoded."""

_TARS_AT_ONCE = 32
"""Tars that are scanned side by side: a header is read only when the one before it is known."""


class ImageEntry(NamedTuple):
    """Sorts bytewise by name; equal names of several sources by source, then place."""

    name: bytes
    source: int
    offset: int
    size: int


def expand_sources(images: Sequence[str], access: Access | None = None) -> tuple[tuple[str, str], ...]:
    """("folder" or "tar", absolute path or URL) of each source a user named, in that order.

    Folders are taken as they are; anything else is a webdataset shard specification: ``a-{000..009}.tar``,
    several joined by ``::``. A URL is a tar if it ends like one, else a folder; nothing is asked of the store.

    Raises:
        ConfigError: something local is neither a folder nor a tar, or a URL holds credentials.
        DataError: a local tar is compressed.
    """
    found: list[tuple[str, str]] = []
    for spec in (spec.removeprefix("file://") for spec in images):
        if not is_url(spec) and os.path.isdir(spec):
            found.append(("folder", os.path.abspath(spec)))
            continue
        for path in _expand(spec):
            if is_url(path):
                found.append(_at_url(path))
            elif os.path.isdir(path):
                found.append(("folder", os.path.abspath(path)))
            else:
                check_tar(path, access or Access())
                found.append(("tar", os.path.abspath(path)))
    doubles = sorted(path for path, times in Counter(path for _, path in found).items() if times > 1)
    if doubles:
        raise ConfigError("--images", doubles[0], "each folder and tar once")
    return tuple(found)


def list_images(sources: Iterable[tuple[str, str]], access: Access | None = None) -> Iterator[ImageEntry]:
    """Every image of ``sources`` (see :func:`expand_sources`), in no particular order.

    Raises:
        DataError: a folder cannot be listed, or a tar is damaged.
        ConfigError: what a URL names is no tar, or no folder that can be listed.
    """
    access = access or Access()
    tars = [(index, path) for index, (kind, path) in enumerate(sources) if kind == "tar"]
    for index, (kind, path) in enumerate(sources):
        if kind == "folder":
            yield from _remote_folder(path, index, access) if is_url(path) else _folder(path, index)
    with ThreadPoolExecutor(_TARS_AT_ONCE) as pool:
        for entries in pool.map(lambda tar: _tar(tar[1], tar[0], access), tars):
            yield from entries


def _expand(spec: str) -> list[str]:
    if spec.startswith("pipe:"):
        raise ConfigError("--images", spec, "folders and tars, here or at a URL", "Commands are not run.")
    try:
        return [str(path) for path in wds.shardlists.expand_urls(spec)]
    except AssertionError as error:  # webdataset's way of telling that ${NAME} is not set
        raise ConfigError("--images", spec, f"an environment in which it can be expanded ({error})") from None
    except ValueError:
        raise ConfigError("--images", spec, "braces in pairs, as in a-{000..099}.tar") from None


def _at_url(url: str) -> tuple[str, str]:
    check_place("--images", url)
    name = url.rstrip("/").rpartition("/")[2].lower()
    if name.endswith(".tar"):
        return "tar", url
    if ".tar." in name or name.endswith((".tgz", ".tbz2", ".zip")):
        raise ConfigError(
            "--images", url, "a plain .tar, whose images can be read by position", "Unpack it first."
        )
    if urlsplit(url).scheme in ("http", "https"):
        raise ConfigError("--images", url, "tars, as a web server lists no folders", "Name them: a-{000..099}.tar")
    return "folder", url.rstrip("/")


def _remote_folder(url: str, source: int, access: Access) -> Iterator[ImageEntry]:
    for name, size in open_place(url, access).files():
        if _is_image(name):
            yield ImageEntry(os.fsencode(name), source, 0, size)


def _folder(root: str, source: int) -> Iterator[ImageEntry]:
    """Image files below ``root``, none in hidden folders; links to folders are followed, each folder once."""
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            listed = list(os.scandir(os.path.join(root, below)))
            status = os.stat(os.path.join(root, below))
        except OSError as error:
            raise DataError(f"{os.path.join(root, below)}: cannot be listed ({error.strerror})") from None
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for item in listed:
            name = f"{below}/{item.name}" if below else item.name
            wanted = _is_image(item.name)
            kind = None if item.name.startswith(".") else _status(item, wanted)
            if kind is not None and stat.S_ISDIR(kind.st_mode):
                pending.append(name)
            elif kind is not None and wanted:
                if not stat.S_ISREG(kind.st_mode):
                    raise DataError(f"{item.path}: got a pipe or device, expected an image file. Remove it")
                yield ImageEntry(os.fsencode(name), source, 0, kind.st_size)


def _status(item: os.DirEntry[str], wanted: bool) -> os.stat_result | None:
    """What an entry is; None for a dead link that is not named like an image."""
    try:
        if not wanted and not item.is_symlink() and not item.is_dir():
            return None  # most entries that are no images: without asking the file system
        return item.stat()
    except OSError as error:
        if not wanted:
            return None
        raise DataError(
            f"{item.path}: cannot be read ({error.strerror}). Remove it, if it is a dead link"
        ) from None


def _tar(path: str, source: int, access: Access) -> list[ImageEntry]:
    if is_url(path):
        check_tar(path, access)  # local ones have been looked at when they were named
    members = scan_tar(path, access, _is_image)
    return [ImageEntry(os.fsencode(name), source, offset, size) for name, offset, size in members]


def _is_image(path: str) -> bool:
    """Whether a path below a source is an image's; hidden files are none, nor what lies in hidden folders."""
    hidden = any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))
    return not hidden and path.lower().endswith(IMAGE_SUFFIXES)
