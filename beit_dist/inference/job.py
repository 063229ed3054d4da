"""A job on many images: on any number of ranks, part by part, so that a restart makes what is missing."""

from __future__ import annotations

import csv
import io
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from beit_dist import __version__
from beit_dist.engine.ranks.distributed import Agreement
from beit_dist.errors import ConfigError, DataError
from beit_dist.inference.collection import Collection
from beit_dist.inference.formats.csv_file import csv_lines
from beit_dist.inference.formats.table import Block, Column, Table, told
from beit_dist.inference.model import LoadedModel
from beit_dist.inference.reading import Read, read
from beit_dist.inference.target import Target
from beit_dist.probing.parts import Parts
from beit_dist.probing.room import check_room
from beit_dist.storage.access import Access

Made = TypeVar("Made")
Progress = Callable[[int], object]

_LEAST, _MOST, _PARTS = 64, 1024, 64
"""Images of a part, fewest and most, and about how many parts there are of fewer than 64 · 1024 images. A restart
does a part again, at most, on each rank; and a rank without a part has nothing to do."""


class Work(ABC, Generic[Made]):
    """What is made of images: of each, ``layers`` times ``width`` numbers, fp32.

    Args:
        model: on the device of this rank once the job runs.
    """

    made: ClassVar[str]
    """What that is, for people: ``features``."""
    layers: int
    width: int

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the numbers depend on besides the weights, the model's settings and the images."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> Made:
        """Called in threads, with an upright RGB image."""

    @abstractmethod
    def make(self, prepared: Sequence[Made], numbers: Sequence[int] | None) -> NDArray[np.float32]:
        """(layers, n, width) of some images of one part.

        Args:
            prepared: the images.
            numbers: of them in the collection; None: nothing shall be written, as they are only measured.
        """

    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """The table's columns behind those that tell which image it is."""

    @abstractmethod
    def values(self, read: Callable[[int], NDArray[np.float32]]) -> Mapping[str, Callable[[], Any]]:
        """The values of these columns for a block, of whose rows ``read(layer)`` reads the numbers (n, width)."""


@dataclass(frozen=True)
class Job(Generic[Made]):
    """Some work on a collection of images.

    Args:
        work: what is made of them.
        images: in the order of the table's rows.
        target: the file; its folder is one that all ranks reach.
        batch: images at once, of one part.
        workers: threads of each rank that decode.
        access: how URLs are reached.
    """

    work: Work[Made]
    images: Collection
    target: Target
    batch: int
    workers: int
    access: Access

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the table depends on, but for the last bits, on which the batch and the device have a say."""
        model = self.work.model
        return {
            "made": self.work.made,
            "weights": model.provenance.digest,
            "model": model.prepare.config.model_dump(mode="json"),
            **self.work.facts,
            "images": self.images.digest,
        }

    @cached_property
    def parts(self) -> Parts:
        """Where the numbers are kept until all are there."""
        count = len(self.images)
        size = min(_MOST, max(_LEAST, count // _PARTS // _LEAST * _LEAST))
        work = self.work
        return Parts(self.target.parts, self.facts, images=count, size=size, layers=work.layers, width=work.width)

    @cached_property
    def is_done(self) -> bool:
        """Whether the file is there, of the same job.

        Raises:
            ConfigError: it is of another job, or none of ours; or another job has begun to make it.
        """
        found = self.target.found()
        self._check(found, str(self.target), f"holds {self.work.made}", "Remove it, or name another --out.")
        if found is None:
            begun, where = self.target.begun(), str(self.target.parts)
            way_out = f"Give what it was begun with, or remove {where} to start over, or name another --out."
            self._check(begun, str(self.target), f"was begun, in {self.target.parts.name},", way_out)
        return found is not None

    def _check(self, found: dict[str, Any] | None, where: str, holds: str, way_out: str) -> None:
        if found is None:
            return
        own = json.loads(json.dumps(self.facts))
        other = [name for name in {**own, **found} if own.get(name) != found.get(name)]
        if other:
            names = " and ".join(other[:2]) if len(other) < 3 else f"{', '.join(other[:2])} and more"
            raise ConfigError("--out", where, f"a new file: that one {holds} of other {names}", way_out)

    def check_room(self) -> None:
        """Refuse a local disk without room for the parts that are missing and the table.

        Raises:
            SpaceError: it has too little.
        """
        parts, count = self.parts, len(self.images)
        needed = sum(map(parts.bytes_of, parts.missing())) + self.table_bytes
        check_room(self.target.place, needed, f"the {self.work.made} of {count:,} images. Free some.")

    @property
    def table_bytes(self) -> int:
        """Of the numbers in the table."""
        return 4 * len(self.images) * sum(max(1, column.width) for column in self.work.columns())

    def run(self, agreement: Agreement, device: torch.device, progress: Progress) -> int:
        """Make what is not there yet; then rank 0 writes the table. Collective.

        Args:
            agreement: the ranks.
            device: this rank's.
            progress: called with the number of images that this rank has just looked at.

        Returns:
            How many images cannot be read.

        Raises:
            DataError: the ranks see different images or weights, or an image is gone.
        """
        rank, world = agreement.ranks.rank, agreement.ranks.world
        if len(set(agreement.gather((self.parts.place.name, self.is_done)))) > 1:
            raise DataError(
                "the ranks see different images, weights or --out. Copy the images to every host, name a folder "
                "for --out that all hosts reach, and of a run that is still training a step folder"
            )
        if self.is_done:
            return self._done(rank)
        if rank == 0:
            self.target.begin(self.facts)
        missing = agreement.from_rank_0(self.parts.missing())
        self._make(missing[rank::world], device, progress)
        agreement.gather(None)  # all parts are there
        found = self._finish() if rank == 0 else 0
        return int(agreement.from_rank_0(found))

    def _done(self, rank: int) -> int:
        if rank == 0:
            self.target.remove_parts()  # where a start was killed after the file was there
        return len(unreadable_of(self.target))

    def unreadable(self) -> Iterator[tuple[int, str]]:
        """Number and reason of every image that cannot be read, of the parts that are there."""
        for part in range(len(self.parts)):
            first = self.parts.rows(part).start
            yield from ((first + row, reason) for row, reason in self._reasons(part))

    def _make(self, missing: Sequence[int], device: torch.device, progress: Progress) -> None:
        if not missing:
            return
        parts, work = self.parts, self.work
        work.model.to(device)
        numbers = [number for part in missing for number in parts.rows(part)]
        images = read(self.images.files, numbers, work.prepare, workers=self.workers, access=self.access)
        for part in missing:
            rows = parts.rows(part)
            made = np.full((work.layers, len(rows), work.width), np.nan, np.float32)
            reasons = []
            for first in range(0, len(rows), self.batch):
                some = list(itertools.islice(images, min(self.batch, len(rows) - first)))
                self._fill(made, rows.start, some)
                reasons += [(each.number - rows.start, each.reason) for each in some if each.made is None]
                progress(len(some))
            self._remember(part, reasons)
            parts.write(part, torch.from_numpy(made))

    def _fill(self, made: NDArray[np.float32], start: int, some: Sequence[Read[Made]]) -> None:
        readable = [(each.number, each.made) for each in some if each.made is not None]
        if readable:
            numbers = [number for number, _ in readable]
            values = self.work.make([prepared for _, prepared in readable], numbers)
            made[:, [number - start for number in numbers]] = values

    def _remember(self, part: int, reasons: Sequence[tuple[int, str]]) -> None:
        """Before the part is there: then so is this."""
        self.parts.place.make()
        if reasons:
            self.parts.place.write(_reasons_name(part), json.dumps(reasons).encode())
        else:
            self.parts.place.remove(_reasons_name(part))  # another start may have been refused an image

    def _reasons(self, part: int) -> list[tuple[int, str]]:
        name = _reasons_name(part)
        place = self.parts.place
        return [(row, reason) for row, reason in json.loads(place.read(name))] if place.exists(name) else []

    def _finish(self) -> int:
        rows = [["source", "name", "reason"]]
        for number, reason in self.unreadable():
            file = self.images.files[number]
            rows.append([told(file.source.path), told(file.name), told(reason)])
        count = len(rows) - 1
        place, name = self.target.place, self.target.unreadable
        if count:
            place.write(name, csv_lines(rows))
        else:
            place.remove(name)  # of an earlier file
        if count == len(self.images):
            raise DataError(
                f"none of the {count:,} images can be read; {self.target.place / name} has the reasons"
            )
        self.target.write(self._table(count))
        self.target.remove_parts()
        return count

    def _table(self, unreadable: int) -> Table:
        names = ("source", "name", *(("label",) if self.images.classes else ()))
        rows = len(self.images) - unreadable
        metadata = {
            "beit_dist": __version__,
            "model": self.work.model.provenance.name,
            "images": rows,
            "unreadable": unreadable,
            "facts": self.facts,
        }
        columns = (*(Column(name, "text") for name in names), *self.work.columns())
        return Table(columns, rows, self._blocks, metadata)

    def _blocks(self) -> Iterator[Block]:
        """The readable images of a part each."""
        for part in range(len(self.parts)):
            rows, lost = self.parts.rows(part), {row for row, _ in self._reasons(part)}
            kept = np.array([row for row in range(len(rows)) if row not in lost], np.int64)
            yield self._block(part, kept, rows.start + kept)

    def _block(self, part: int, kept: NDArray[np.int64], numbers: NDArray[np.int64]) -> Block:
        images = self.images

        def values(layer: int) -> NDArray[np.float32]:
            return self.parts.read(part, layer)[kept]

        texts: dict[str, Callable[[], Any]] = {
            "source": lambda: [told(images.files[number].source.path) for number in numbers],
            "name": lambda: [told(images.files[number].name) for number in numbers],
            "label": lambda: [None if (label := images.label(n)) is None else told(label) for n in numbers],
        }
        return Block(len(kept), {**texts, **self.work.values(values)})


def _reasons_name(part: int) -> str:
    return f"part-{part:06d}.json"


def unreadable_of(target: Target) -> list[list[str]]:
    """Source, name and reason of each image that could not be read, from the list beside a finished file."""
    if not target.place.exists(target.unreadable):
        return []
    text = io.StringIO(target.place.read(target.unreadable).decode(), newline="")
    return list(csv.reader(text))[1:]
