"""What one source holds, gathered file by file: its images, and what is left out, counted by kind."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import NamedTuple

from beit_dist.data.file_kinds import (
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
from beit_dist.data.left_out import Kind, LeftOut
from beit_dist.data.own_output import (
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
from beit_dist.errors import StorageError

_SNIFF = "--sniff reads their first bytes, with a request for each"
_UNREADABLE = Kind("unreadable file", "unreadable files", "make them readable: chmod +r")
_VIEW = re.compile(r"v\d\d")
"""A folder of shards."""

Look = Callable[[], bytes]
"""Reads a file's first bytes."""


class ImageEntry(NamedTuple):
    """Sorts bytewise by name; equal names of several sources by source, then place."""

    name: bytes
    source: int
    offset: int
    size: int


class Gathered:
    """What a source holds; names are relative to it and have ``/`` between their parts.

    Args:
        source: its number.
        ask_later: keep files that must be looked into, and were not, in :attr:`unsure`.
    """

    def __init__(self, source: int, ask_later: bool = False) -> None:
        self.images: list[ImageEntry] = []
        self.unsure: list[tuple[str, Named, int]] = []
        self._source, self._ask_later = source, ask_later
        self._left: dict[tuple[str, Kind], tuple[int, str]] = {}
        """Of each folder: how many of a kind, and one of them."""
        self._marks: defaultdict[str, set[str]] = defaultdict(set)
        self._weights: dict[str, tuple[int, Look | None]] = {}
        """Size of each file of weights, by its name without suffix, and how to look into it."""

    def meet(self, name: str, size: int, offset: int = 0, look: Look | None = None) -> None:
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
            self.judge(name, verdict, size, offset, look)

    def named(self, name: str, size: int = 0, look: Look | None = None) -> Verdict:
        """What a file's own name tells of it."""
        last = name.rpartition("/")[2]
        if last.endswith(WEIGHTS):
            self._weights[name[: -len(WEIGHTS)]] = size, look
        return file_kind(last) or by_name(last)

    def weights_beside_pictures(self) -> list[tuple[str, int]]:
        """Name and size of weights that could be tokenizers with a picture, and cannot be looked into."""
        stems = {stem for entry in self.images if (stem := _picture_of(os.fsdecode(entry.name)))}
        return [
            (stem + WEIGHTS, size) for stem, (size, look) in self._weights.items() if stem in stems and not look
        ]

    def judge(self, name: str, named: Named, size: int, offset: int = 0, look: Look | None = None) -> None:
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
        elif unsure and self._ask_later:
            self.unsure.append((name, named, size))
            return
        if verdict == "image":
            self.images.append(ImageEntry(os.fsencode(name), self._source, offset, size))
        elif verdict == "unknown":
            self.leave(unknown(name, "" if look is not None else _SNIFF), name)
        else:
            self.leave(verdict, name)

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

    def finish(self, left_out: LeftOut) -> list[ImageEntry]:
        """The images without those that we have written; what is left out is added to ``left_out``."""
        own = dict(self._own_folders())
        kept = []
        for entry in self.images:
            name = os.fsdecode(entry.name)
            if own and _inside(name, own):
                continue
            if self._weights and self._is_tokenizer(_picture_of(name)):
                self.leave(TOKENIZER_PICTURE, name)
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
