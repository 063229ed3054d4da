"""Freezing: every image of folders and tars, in one order that the recorded seed decides."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import webdataset as wds
from tqdm import tqdm

from beit_dist.data.draws import Purpose, permutation
from beit_dist.data.sample import SampleNotes, encode_notes, sample_key
from beit_dist.errors import ConfigError, DataError
from beit_dist.tokenizing.durable import writing
from beit_dist.tokenizing.sources import SOURCES_NAME, SourcesHeader, label_of, read_header

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif",
)  # fmt: skip
"""What counts as an image file; upper case too. Whether it is one shows when it is decoded."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_END_BLOCKS = 1 << 20
"""Zero bytes after the last member that are ordinary padding (tar's blocking factor is rarely above 1 MiB)."""


class _Entry(NamedTuple):
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


def freeze(images: Sequence[str], out: Path, seed: int) -> SourcesHeader:
    """Write ``sources.jsonl``, or keep the one that is there if it was frozen from the same sources and seed.

    Raises:
        ConfigError: the sources cannot be used, or the list there is of others.
        DataError: a tar is compressed or damaged, a class name too long, or there is no image at all.
    """
    sources = expand_sources(images)
    if (out / SOURCES_NAME).exists():
        header = read_header(out)
        check_same_sources(header, sources, seed, out)
        return header
    entries: list[_Entry] = []
    with tqdm(desc="listing images", unit=" images", disable=None) as bar:
        for index, (kind, path) in enumerate(sources):
            for entry in _folder(path, index) if kind == "folder" else _tar(path, index):
                entries.append(entry)
                bar.update()
    if not entries:
        raise DataError(f"--images {' '.join(images)}: no image found, looked for *{', *'.join(IMAGE_SUFFIXES)}")
    entries.sort()
    labels = _label_names(entries)
    header = SourcesHeader(sources, seed, len(entries), labels=bool(labels))
    for label in labels:
        # The longest json: refuse the label now rather than in the middle of the job.
        encode_notes(0, sample_key(0, 0), SampleNotes("", label, (9**9,) * 4, flip=False))
    with writing(out / SOURCES_NAME) as file:
        file.write((header.to_line() + "\n").encode())
        for row in permutation(seed, Purpose.SOURCE_ORDER, (), len(entries)):
            file.write(_line(entries[row], sources))
    return header


def check_same_sources(
    header: SourcesHeader, sources: tuple[tuple[str, str], ...] | None, seed: int, out: Path
) -> None:
    """Refuse a list that was frozen from other images (None: not asked) or with another seed."""
    way_out = f"Give the same as when {out / SOURCES_NAME} was frozen, or start over in another --out."
    if sources is not None and sources != header.sources:
        got, expected = ([path for _, path in s] for s in (sources, header.sources))
        raise ConfigError("--images", got, f"{expected}", way_out)
    if seed != header.seed:
        raise ConfigError("--seed", seed, f"{header.seed}", way_out)


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


def _folder(root: str, source: int) -> Iterator[_Entry]:
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
                yield _Entry(os.fsencode(name), source, 0, _size(item))


def _size(item: os.DirEntry[str]) -> int:
    try:
        return item.stat().st_size
    except OSError as error:
        raise DataError(
            f"{item.path}: cannot be read ({error.strerror}). Remove it, if it is a dead link"
        ) from None


def _tar(path: str, source: int) -> Iterator[_Entry]:
    """Image members of a plain tar, by one scan of its headers."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                name = member.name.removeprefix("./")
                if member.isreg() and not member.issparse() and _is_image(os.path.basename(name)):
                    yield _Entry(os.fsencode(name), source, member.offset_data, member.size)
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


def _label_names(entries: Iterable[_Entry]) -> set[str]:
    """The class folders, if there are any: every image lies in some folder, and they are at least two."""
    labels = {label_of(os.fsdecode(entry.name)) for entry in entries}
    return labels if "" not in labels and len(labels) > 1 else set()


def _line(entry: _Entry, sources: tuple[tuple[str, str], ...]) -> bytes:
    fields: dict[str, str | int] = {"name": os.fsdecode(entry.name), "source": entry.source, "bytes": entry.size}
    if sources[entry.source][0] == "tar":
        fields["offset"] = entry.offset
    return (json.dumps(fields) + "\n").encode()
