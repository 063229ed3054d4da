"""Finding images: the files below folders and the members of tars, as users name them."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import webdataset as wds

from beit_dist.errors import ConfigError, DataError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif",
)  # fmt: skip
"""What counts as an image file; upper case too. Whether it is one shows when it is decoded."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_END_BLOCKS = 1 << 20
"""Zero bytes after the last member that are ordinary padding (tar's blocking factor is rarely above 1 MiB)."""


class ImageEntry(NamedTuple):
    """Sorts bytewise by name; equal names of several sources by source, then place."""

    name: bytes
    source: int
    offset: int
    size: int


def expand_sources(images: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """("folder" or "tar", absolute path) of each source a user named, in that order.

    Folders are taken as they are; anything else is a webdataset shard specification: ``a-{000..009}.tar``,
    several joined by ``::``.

    Raises:
        ConfigError: something is neither a folder nor a tar, or is remote.
        DataError: a tar is compressed.
    """
    found: list[tuple[str, str]] = []
    for spec in images:
        if os.path.isdir(spec):
            found.append(("folder", os.path.abspath(spec)))
            continue
        for path in _expand(spec):
            if os.path.isdir(path):
                found.append(("folder", os.path.abspath(path)))
            else:
                _check_tar(path)
                found.append(("tar", os.path.abspath(path)))
    doubles = sorted({path for _, path in found if [p for _, p in found].count(path) > 1})
    if doubles:
        raise ConfigError("--images", doubles[0], "each folder and tar once")
    return tuple(found)


def list_images(sources: Iterable[tuple[str, str]]) -> Iterator[ImageEntry]:
    """Every image of ``sources`` (see :func:`expand_sources`), in no particular order.

    Raises:
        DataError: a folder cannot be listed, or a tar is damaged.
    """
    for index, (kind, path) in enumerate(sources):
        yield from _folder(path, index) if kind == "folder" else _tar(path, index)


def _expand(spec: str) -> list[str]:
    if spec.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", spec):
        raise ConfigError(
            "--images",
            spec,
            "folders and tars of this machine",
            "Mount the storage, or copy the tars first.",
        )
    try:
        return [str(path) for path in wds.shardlists.expand_urls(spec)]
    except AssertionError as error:  # webdataset's way of telling that ${NAME} is not set
        raise ConfigError("--images", spec, f"an environment in which it can be expanded ({error})") from None


def _check_tar(path: str) -> None:
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise ConfigError("--images", path, f"a folder or a tar of images ({error.strerror})") from None
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path}: compressed by {name}, so its images cannot be read by position. Decompress it, "
                f"or extract it and name the folder: mkdir images && tar -xf {os.path.basename(path)} -C images"
            )
    if not tarfile.is_tarfile(path):
        raise ConfigError("--images", path, "a folder, or a tar (this file is none)")


def _folder(root: str, source: int) -> Iterator[ImageEntry]:
    """Image files below ``root``, hidden ones left out; links to folders are followed, each folder once."""
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
            if item.is_dir():
                pending.append(name)
            elif _is_image(item.name):
                yield ImageEntry(os.fsencode(name), source, 0, _size(item))


def _size(item: os.DirEntry[str]) -> int:
    try:
        return item.stat().st_size
    except OSError as error:
        raise DataError(
            f"{item.path}: cannot be read ({error.strerror}). Remove it, if it is a dead link"
        ) from None


def _tar(path: str, source: int) -> Iterator[ImageEntry]:
    """Image members of a plain tar, by one scan of its headers."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                name = member.name.removeprefix("./")
                if member.isreg() and not member.issparse() and _is_image(os.path.basename(name)):
                    yield ImageEntry(os.fsencode(name), source, member.offset_data, member.size)
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every header
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: damaged or cut short ({error}). Copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    _check_end(path, end)


def _check_end(path: str, end: int) -> None:
    """tarfile takes a damaged header, or the end of a truncated file, for the end of the archive."""
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(_END_BLOCKS)
    if len(rest) < 512 or any(rest):
        reason = (
            "no closing block: cut short" if len(rest) < 512 else "other data behind its end: damaged or joined"
        )
        raise DataError(f"{path}: {reason} at byte {end}. Copy it again; give joined tars one by one")


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
