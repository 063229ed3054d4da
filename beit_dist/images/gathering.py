"""What one source holds, gathered file by file: its images, and what is left out, counted by kind."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import NamedTuple

from beit_dist.errors import StorageError
from beit_dist.images.file_kinds import (
    POINTER_BYTES,
    Named,
    Verdict,
    by_content,
    by_name,
    file_kind,
    folder_kind,
    is_pointer,
    unknown,
)
from beit_dist.images.left_out import Kind, LeftOut
from beit_dist.images.own_output import (
    MARKS,
    RUN,
    RUN_PART,
    RUN_PARTS,
    SHARDS,
    TOKENIZER_PICTURE,
    WEIGHTS,
    is_tokenizer,
    ours,
)

_SNIFF = "--sniff recognises them by their first bytes, with one request for each"
_UNREADABLE = Kind("unreadable file", "unreadable files", "make them readable: chmod +r")
_VIEW = re.compile(r"v\d\d")
"""A folder of shards."""

Look = Callable[[], bytes]
"""Reads a file's first bytes."""


class Entry(NamedTuple):
    """An image of a source. Sorts bytewise by name; equal names of several sources by source, then place."""

    name: bytes
    """Below the source, with ``/`` between its parts."""
    source: int
    """The source's number."""
    at: tuple[int, ...]
    """Where the image lies, as its source understands it."""
    size: int
    """In bytes, or another number by which the source notices that the image changed."""
    label: str | None = None
    """None: the source has no labels of its own, so the folder's name may be one. Empty: there is none."""

    @property
    def text(self) -> str:
        """The name as a string."""
        return os.fsdecode(self.name)

    @property
    def class_name(self) -> str:
        """Its label, or the name of the folder it lies in; empty without either."""
        return os.path.basename(os.path.dirname(self.text)) if self.label is None else self.label


class Gathered:
    """What a source holds; names are relative to it and have ``/`` between their parts.

    Args:
        source: its number.
        sniff: files that must be looked into, and cannot be at once, are kept in :attr:`unsure`.
        progress: called with how many more images were found.
        labels: also read labels from files beside the images, where the source has any.
    """

    def __init__(
        self,
        source: int,
        sniff: bool = False,
        progress: Callable[[int], object] = lambda count: None,
        labels: bool = False,
    ) -> None:
        self.images: list[Entry] = []
        self.unsure: list[tuple[str, Named, int]] = []
        self.sniff, self.labels = sniff, labels
        self._labels: dict[str, str] = {}
        """By the key of their images."""
        self._source, self._progress = source, progress
        self._left: dict[tuple[str, Kind], tuple[int, str]] = {}
        """Of each folder: how many of a kind, and one of them."""
        self._marks: defaultdict[str, set[str]] = defaultdict(set)
        self._weights: dict[str, tuple[int, Look | None]] = {}
        """Size of each file of weights, by its name without suffix, and how to look into it."""

    def meet(self, name: str, size: int, at: tuple[int, ...] = (), look: Look | None = None) -> None:
        """Take a file, or leave it out, by all that its path tells; ``look`` None: it cannot be looked into."""
        parts = name.split("/")
        folder = ""
        for depth, part in enumerate(parts):
            if part in MARKS:
                self.note(folder, {part})
            if depth < len(parts) - 1:
                folder = "/".join(parts[: depth + 1])
                if (kind := folder_kind(part)) is not None:
                    self.leave_folder(kind, folder)
                    return
        if look is not None and name.endswith(WEIGHTS):
            look = partial(bytes, look())  # the tar is closed when it is needed
        verdict = self.named(name, size, look)
        if isinstance(verdict, Kind):
            self.leave(verdict, name)
        else:
            self.judge(name, verdict, size, at, look)

    def named(self, name: str, size: int = 0, look: Look | None = None) -> Verdict:
        """What a file's own name tells of it."""
        last = name.rpartition("/")[2]
        if last.endswith(WEIGHTS):
            self._weights[name[: -len(WEIGHTS)]] = size, look
        return file_kind(last) or by_name(last)

    def weights_beside_pictures(self) -> list[tuple[str, int]]:
        """Name and size of weights that could be tokenizers with a picture, and cannot be looked into."""
        stems = {stem for entry in self.images if (stem := _picture_of(entry.text))}
        return [
            (stem + WEIGHTS, size) for stem, (size, look) in self._weights.items() if stem in stems and not look
        ]

    def judge(
        self, name: str, named: Named, size: int, at: tuple[int, ...] = (), look: Look | None = None
    ) -> None:
        """Take a file whose path tells no reason against it, or leave it out by its first bytes."""
        unsure = size > 0 and (named == "unknown" or size < POINTER_BYTES)
        verdict: Verdict = named
        if unsure and look is not None:
            try:
                head = look()
            except StorageError:
                raise
            except OSError:
                if named == "unknown":
                    self.leave(_UNREADABLE, name)
                    return
                head = b""  # whoever reads the whole image says more
            found = by_content(head)
            if named == "unknown" or is_pointer(found):
                verdict = found
            if is_tokenizer(head):
                self._weights |= dict.fromkeys((name, os.path.splitext(name)[0]), (size, partial(bytes, head)))
        elif unsure and self.sniff:
            self.unsure.append((name, named, size))
            return
        if verdict == "image":
            self.take(name, size, at)
        elif verdict == "unknown":
            self.leave(unknown(name, "" if look is not None else _SNIFF), name)
        else:
            self.leave(verdict, name)

    def take(self, name: str, size: int, at: tuple[int, ...] = (), label: str | None = None) -> None:
        """Take an image, whatever it is called."""
        self.images.append(Entry(os.fsencode(name), self._source, at, size, label))
        self._progress(1)

    def label(self, name: str, label: str, *, again: bool) -> None:
        """Give the images of a file's key a label; ``again``: also where another file has given one."""
        if again or _key(name) not in self._labels:
            self._labels[_key(name)] = label

    def part(self) -> Gathered:
        """An empty one of the same source, for a thread that searches a part of it."""
        return Gathered(self._source, self.sniff, self._progress, self.labels)

    def absorb(self, part: Gathered) -> None:
        """Take over what a :meth:`part` has gathered."""
        self.images += part.images
        self.unsure += part.unsure
        self._weights |= part._weights
        self._labels |= part._labels
        for folder, names in part._marks.items():
            self._marks[folder] |= names
        for key, (count, example) in part._left.items():
            before, first = self._left.get(key, (0, example))
            self._left[key] = (before + count, min(first, example))

    def note(self, folder: str, names: Set[str]) -> None:
        """Remember what lies in a folder, as far as it may tell that the folder is one of ours."""
        self._marks[folder] |= names & MARKS

    def leave(self, kind: Kind, name: str) -> None:
        """Count a file that is left out."""
        key = (name.rpartition("/")[0], kind)
        count, example = self._left.get(key, (0, name))
        self._left[key] = (count + 1, min(example, name))

    def leave_folder(self, kind: Kind, folder: str) -> None:
        """Count a folder that is not searched, once."""
        self._left[folder, kind] = (1, folder)

    def finish(self, left_out: LeftOut) -> list[Entry]:
        """The images without those that we have written; what is left out is added to ``left_out``."""
        own = dict(self._own_folders())
        kept = []
        for entry in self.images:
            name = entry.text
            if own and _inside(name, own):
                continue
            if self._weights and self._is_tokenizer(_picture_of(name)):
                self.leave(TOKENIZER_PICTURE, name)
            elif self._labels:
                kept.append(entry._replace(label=self._labels.get(_key(name), "")))
            else:
                kept.append(entry)
        for folder, kind in own.items():
            if not _inside(folder, own):
                left_out.add(kind, 1, folder)
        beside_shards = ours(self._marks[""]) is SHARDS
        for (folder, kind), (count, example) in self._left.items():
            shards = beside_shards and _VIEW.fullmatch(folder)
            if not (shards or folder in own or _inside(folder, own)):
                left_out.add(kind, count, example)
        return kept

    def _is_tokenizer(self, stem: str) -> bool:
        """Whether there are weights of that name, and they are known to be a tokenizer of ours."""
        look = self._weights.get(stem, (0, None))[1]
        try:
            return look is not None and is_tokenizer(look())
        except StorageError:
            raise
        except OSError:
            return False

    def _own_folders(self) -> Iterator[tuple[str, Kind]]:
        for folder, names in self._marks.items():
            kind = ours(names)
            if kind is not None and folder:
                yield folder, kind
            elif kind is RUN:  # the images lie in the run folder itself
                yield from ((part, RUN_PART) for part in names & RUN_PARTS)


def _key(name: str) -> str:
    """What the files of a sample have in common (webdataset): the name up to the first dot behind the folders."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _picture_of(name: str) -> str:
    """The stem of a .png; empty for other files."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() == ".png" else ""


def _inside(name: str, folders: dict[str, Kind]) -> bool:
    """Whether a file or folder lies below one of ``folders``."""
    at = name.rfind("/")
    while at > 0:
        if name[:at] in folders:
            return True
        at = name.rfind("/", 0, at)
    return False
