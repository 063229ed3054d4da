"""The frozen list of images, ``sources.jsonl``: all workers read it, so they agree on what each shard holds.

The first line is a header, each further line one image. Sample id = position in the list. A list of many
millions of images is never held in memory: one pass takes its sha256 and notes where each shard's lines begin.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from beit_dist.data.image_bytes import read_image
from beit_dist.errors import DataError, SampleError, StorageError
from beit_dist.storage.access import Access
from beit_dist.storage.place import Place
from beit_dist.storage.streams import open_stream

SOURCES_NAME = "sources.jsonl"
FORMAT = "beit_dist sources"
FORMAT_VERSION = 1


class Source(NamedTuple):
    """One image: a file of a folder, or the bytes of a tar's member."""

    sample_id: int
    name: str
    """Path below the folder, or the member's name, with ``/``."""
    place: str
    """Absolute path or URL of the file or tar that holds it."""
    offset: int | None
    """Where its bytes begin in a tar; None for a file of its own."""
    size: int
    """In bytes; another one later means that the images changed."""
    label: str | None


@dataclass(frozen=True)
class SourcesHeader:
    """What was frozen."""

    sources: tuple[tuple[str, str], ...]
    """("folder" or "tar", absolute path or URL) of each source."""
    seed: int
    """The list was permuted by it."""
    entries: int
    labels: bool
    """Whether the images lie in class folders, whose names are the labels."""
    sniff: bool = False
    """Whether files at URLs were looked into where their names did not tell what they are."""

    def to_line(self) -> str:
        """The header line, without its end."""
        return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)})


class SourceList:
    """Reads ``sources.jsonl`` shard by shard.

    Args:
        out: the data set's folder.
        shard_samples: entries of a shard.

    Raises:
        DataError: there is no list, or it is damaged.
    """

    def __init__(self, out: Place, shard_samples: int) -> None:
        self.path = str(out / SOURCES_NAME)
        self.shard_samples, self._out = shard_samples, out
        self.header = read_header(out)
        self.sha256, self._starts = self._scan()

    @property
    def shards(self) -> int:
        """Shards of one view."""
        return -(-self.header.entries // self.shard_samples)

    def entries_of(self, shard: int) -> int:
        """How many entries a shard has."""
        return min(self.shard_samples, self.header.entries - shard * self.shard_samples)

    def read(self, shard: int) -> list[Source]:
        """The entries ``[shard · n, (shard + 1) · n)`` of the list."""
        first, start, end = shard * self.shard_samples, *self._starts[shard : shard + 2]
        raw = bytearray(end - start)
        try:
            self._out.read_into(SOURCES_NAME, start, memoryview(raw))
        except EOFError:
            raise DataError(f"{self.path}: became shorter while it was read. Put the old file back") from None
        return [self._parse(first + i, line) for i, line in enumerate(bytes(raw).splitlines())]

    def _scan(self) -> tuple[str, list[int]]:
        """The list's sha256; where the lines of each shard begin, and the end of the list."""
        digest, starts, position, line_number = hashlib.sha256(), [], 0, -1
        with open_stream(self._out, SOURCES_NAME) as file:
            for line in file:
                if line_number >= 0 and line_number % self.shard_samples == 0:
                    starts.append(position)
                digest.update(line)
                position += len(line)
                line_number += 1
        if line_number != self.header.entries:
            raise DataError(
                f"{self.path}: got {line_number} entries, expected {self.header.entries}. Freeze the list again: "
                "remove the file and run shard_tokens.py --index-only"
            )
        return digest.hexdigest(), [*starts, position]

    def _parse(self, sample_id: int, line: bytes) -> Source:
        try:
            entry: dict[str, Any] = json.loads(line)
            name, (kind, path) = str(entry["name"]), self.header.sources[entry["source"]]
            size, offset = int(entry["bytes"]), None if kind == "folder" else int(entry["offset"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise DataError(f"{self.path}: entry {sample_id} is damaged: {line!r}") from None
        place = f"{path.rstrip('/')}/{name}" if kind == "folder" else path
        label = label_of(name) if self.header.labels else None
        return Source(sample_id, name, place, offset, size, label)


def label_of(name: str) -> str:
    """The class of an image in class folders: the name of the folder it lies in ('' at the top)."""
    return os.path.basename(os.path.dirname(name))


def read_header(out: Place) -> SourcesHeader:
    """The header of the list in the data set's folder.

    Raises:
        DataError: there is no list, or it is none of ours.
    """
    path = out / SOURCES_NAME
    try:
        with open_stream(out, SOURCES_NAME) as file:
            fields = json.loads(file.readline())
    except StorageError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"{path}: not found. Workers that share a job need its frozen list of images: run the same command "
            "with --index-only once, before them"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not isinstance(fields, dict) or (fields.get("format"), fields.get("version")) != (FORMAT, FORMAT_VERSION):
        raise DataError(f"{path}: got another kind of file, expected {FORMAT}, version {FORMAT_VERSION}")
    try:
        sources = tuple((str(kind), str(place)) for kind, place in fields["sources"])
        seed, entries, labels = int(fields["seed"]), int(fields["entries"]), bool(fields["labels"])
        return SourcesHeader(sources, seed, entries, labels, bool(fields.get("sniff", False)))
    except (KeyError, ValueError, TypeError):
        raise DataError(f"{path}: the header is incomplete: {fields}") from None


def read_source(source: Source, access: Access | None = None) -> bytes:
    """The bytes of an image.

    Raises:
        DataError: the file is gone or has another size than when the list was frozen.
        SampleError: the storage failed; another attempt may succeed.
        StorageError: a store failed for as long as it was tried again.
    """
    try:
        raw = read_image(source.place, source.offset, source.size, access or Access())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{source.place}: gone since the list was frozen. Put it back, or start over in another --out"
        ) from None
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise SampleError(f"{source.place}: {source.name} cannot be read ({reason})") from None
    if len(raw) != source.size:
        found = f"got {len(raw)} bytes, expected {source.size}"
        if source.offset is not None:
            found = f"no image of {source.size} bytes at byte {source.offset}"
        raise DataError(
            f"{source.place}: changed since the list was frozen ({source.name}: {found}). Put the old file "
            "back, or start over in another --out"
        )
    return raw
