"""The frozen list of images, ``sources.jsonl``: all workers read it, so they agree on what each shard holds.

The first line is a header, each further line one image. Sample id = position in the list. A list of many
millions of images is never held in memory: one pass takes its sha256 and notes where each shard's lines begin.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from beit_dist.errors import DataError, SampleError, StorageError
from beit_dist.images.gathering import Entry
from beit_dist.images.rejection import ChangedError
from beit_dist.images.source import Source
from beit_dist.images.sources.table import source_of
from beit_dist.storage.access import Access
from beit_dist.storage.place import Place
from beit_dist.storage.streams import open_stream

SOURCES_NAME = "sources.jsonl"
FORMAT = "beit_dist sources"
FORMAT_VERSION = 1
SPLIT_VERSION = 2
"""Of a list with held-out images: releases that know of none would train on them."""


class ListedImage(NamedTuple):
    """One image of the list."""

    sample_id: int
    source: Source
    entry: Entry
    label: str | None

    @property
    def name(self) -> str:
        """Below its source, with ``/``."""
        return self.entry.text

    @property
    def place(self) -> str:
        """Absolute path or URL of the file that holds it."""
        return self.source.file_of(self.entry)


@dataclass(frozen=True)
class SourcesHeader:
    """What was frozen."""

    sources: tuple[Source, ...]
    seed: int
    """The list was permuted by it."""
    entries: int
    labels: bool
    """Whether all images have labels: the names of their class folders, or those that their sources give."""
    sniff: bool = False
    """Whether files at URLs were looked into where their names did not tell what they are."""

    held_out: int = 0
    """So many of the last entries are not trained on."""

    def to_line(self) -> str:
        """The header line, without its end."""
        version = SPLIT_VERSION if self.held_out else FORMAT_VERSION
        fields = {"format": FORMAT, "version": version, **asdict(self)}
        fields["sources"] = [(source.kind, source.path) for source in self.sources]
        if not self.held_out:
            del fields["held_out"]
        return json.dumps(fields)

    def entry_line(self, entry: Entry) -> bytes:
        """An image's line: what its source calls the numbers of its place are fields of their own."""
        fields: dict[str, str | int] = {"name": entry.text, "source": entry.source, "bytes": entry.size}
        fields |= zip(self.sources[entry.source].position, entry.at, strict=True)
        if entry.label is not None:
            fields["label"] = entry.label
        return (json.dumps(fields) + "\n").encode()

    def read_entry(self, line: bytes) -> Entry:
        """The image of a line.

        Raises:
            ValueError, LookupError, TypeError: it is none of ours.
        """
        fields: dict[str, Any] = json.loads(line)
        number, label = int(fields["source"]), fields.get("label")
        at = tuple(int(fields[name]) for name in self.sources[number].position)
        name = os.fsencode(str(fields["name"]))
        return Entry(name, number, at, int(fields["bytes"]), None if label is None else str(label))


class SourceList:
    """Reads ``sources.jsonl`` shard by shard: the images to train on, or those held out.

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
        self.first, self.entries = 0, self.header.entries - self.header.held_out
        self.sha256, self._starts, self._held_out_starts = self._scan()

    def held_out(self) -> SourceList | None:
        """The same list's held-out images, with shards of their own; None if there are none."""
        if not self.header.held_out:
            return None
        other = copy.copy(self)
        other.first, other.entries, other._starts = self.entries, self.header.held_out, self._held_out_starts
        return other

    @property
    def shards(self) -> int:
        """Shards of one view."""
        return -(-self.entries // self.shard_samples)

    def entries_of(self, shard: int) -> int:
        """How many entries a shard has."""
        return min(self.shard_samples, self.entries - shard * self.shard_samples)

    def read(self, shard: int) -> list[ListedImage]:
        """The entries ``[shard · n, (shard + 1) · n)`` of this part of the list."""
        first, start, end = self.first + shard * self.shard_samples, *self._starts[shard : shard + 2]
        raw = bytearray(end - start)
        try:
            self._out.read_into(SOURCES_NAME, start, memoryview(raw))
        except EOFError:
            raise DataError(f"{self.path}: shrank while it was read. Put the old file back") from None
        return [self._parse(first + i, line) for i, line in enumerate(bytes(raw).splitlines())]

    def _scan(self) -> tuple[str, list[int], list[int]]:
        """The list's sha256; where the lines of each shard begin, and the end of the last; likewise held out."""
        digest, position, line_number = hashlib.sha256(), 0, -1
        starts, held_out = list[int](), list[int]()
        with open_stream(self._out, SOURCES_NAME) as file:
            for line in file:
                within = line_number - self.entries
                if within >= 0 and within % self.shard_samples == 0:
                    held_out.append(position)
                elif 0 <= line_number < self.entries and line_number % self.shard_samples == 0:
                    starts.append(position)
                digest.update(line)
                position += len(line)
                line_number += 1
        if line_number != self.header.entries:
            raise DataError(
                f"{self.path}: got {line_number} entries, expected {self.header.entries}. Freeze the list again: "
                "remove the file and run beit shards --index-only"
            )
        return digest.hexdigest(), [*starts, *held_out[:1], position], [*held_out, position]

    def _parse(self, sample_id: int, line: bytes) -> ListedImage:
        try:
            entry = self.header.read_entry(line)
        except (ValueError, LookupError, TypeError):
            raise DataError(f"{self.path}: entry {sample_id} is damaged: {line!r}") from None
        label = entry.class_name if self.header.labels else None
        return ListedImage(sample_id, self.header.sources[entry.source], entry, label)


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
    kind = (fields.get("format"), fields.get("version")) if isinstance(fields, dict) else None
    if kind not in ((FORMAT, FORMAT_VERSION), (FORMAT, SPLIT_VERSION)):
        raise DataError(f"{path}: got another kind of file, expected {FORMAT}, version {FORMAT_VERSION} or more")
    try:
        sources = tuple(source_of(str(kind), str(place)) for kind, place in fields["sources"])
        seed, entries, labels = int(fields["seed"]), int(fields["entries"]), bool(fields["labels"])
        held_out = int(fields.get("held_out", 0))
        if not 0 <= held_out <= max(0, entries - 1):
            raise ValueError(held_out)
        return SourcesHeader(sources, seed, entries, labels, bool(fields.get("sniff", False)), held_out)
    except (KeyError, ValueError, TypeError):
        raise DataError(f"{path}: the header is incomplete: {fields}") from None


def read_listed(listed: ListedImage, access: Access | None = None) -> bytes:
    """The bytes of an image.

    Raises:
        ImageRejectedError: they are damaged, as the archive's own checks say.
        DataError: the image is gone, or another one than when the list was frozen.
        SampleError: the storage failed; another attempt may succeed.
        StorageError: a store failed for as long as it was tried again.
    """
    try:
        return listed.source.read(listed.entry, access or Access())
    except ChangedError as error:
        raise DataError(
            f"{listed.place}: changed since the list was frozen ({listed.name}: {error}). Put the old file "
            "back, or start over in another --out"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{listed.place}: gone since the list was frozen. Put it back, or start over in another --out"
        ) from None
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise SampleError(f"{listed.place}: {listed.name} cannot be read ({reason})") from None
