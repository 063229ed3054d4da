"""Folders of images: every file below, here or in a store; links to folders are followed."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from beit_dist.errors import DataError
from beit_dist.images.file_bytes import middle, read_whole
from beit_dist.images.file_kinds import HEAD, folder_kind
from beit_dist.images.gathering import Entry, Gathered
from beit_dist.images.left_out import Kind
from beit_dist.images.own_output import RUN, RUN_PART, RUN_PARTS, ours
from beit_dist.images.rejection import ChangedError
from beit_dist.images.source import Source
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place, is_url

_MOST_WAYS = 1000
"""Ways that lead to one folder. Links among a dozen folders can make more of them than there are atoms."""
_AT_ONCE = 32
"""Requests for first bytes under way."""
_CIRCLE = Kind("link to a folder that contains it", "links to folders that contain them")
_DEAD = Kind("dead link", "dead links")
_SPECIAL = Kind("pipe, socket or device", "pipes, sockets or devices")
_HUB = Kind(
    "Hugging Face cache", "Hugging Face caches", "name a folder of its snapshots/, where each image lies once"
)
_REVISION = re.compile("[0-9a-f]{40}")

_Folder = tuple[int, int]
"""Device and inode: the same for all links to a folder."""


class Folder(Source):
    """A folder, here or in a store, with all that lies below it."""

    kind = "folder"

    @property
    def sniffs_on_request(self) -> bool:
        return is_url(self.path)

    def search(self, found: Gathered, access: Access) -> None:
        if is_url(self.path):
            _search_store(open_place(self.path, access), found)
        else:
            _search_folder(self.path, found)

    def read(self, entry: Entry, access: Access) -> bytes:
        raw = read_whole(self.file_of(entry), access)
        if len(raw) != entry.size:
            raise ChangedError(f"got {len(raw)} bytes, expected {entry.size}")
        return raw

    def read_middle(self, entry: Entry, size: int, access: Access) -> bytes:
        return middle(self.file_of(entry), 0, entry.size, size, access)

    def file_of(self, entry: Entry) -> str:
        return f"{self.path.rstrip('/')}/{entry.text}"

    def where(self, entry: Entry) -> str:
        return self.file_of(entry)


def _search_folder(root: str, gathered: Gathered) -> None:
    """Every file below ``root``. A folder that several links lead to is searched for each: its names differ.

    A link to a folder around it is not followed.

    Raises:
        DataError: a folder cannot be listed, what is named like an image is none, or links multiply without end.
    """
    ways: Counter[_Folder] = Counter()
    pending: list[tuple[str, tuple[_Folder, ...]]] = [("", ())]
    while pending:
        below, around = pending.pop()
        path = os.path.join(root, below)
        listed, folder = _listed(path)
        ways[folder] += 1
        if ways[folder] > _MOST_WAYS:
            raise DataError(
                f"{path}: more than {_MOST_WAYS} chains of links lead here. Remove links that go round in circles"
            )
        names = {item.name for item in listed}
        kind = _CIRCLE if folder in around else _HUB if _is_hub_cache(path, names) else ours(names)
        if kind is not None and (below or kind is _HUB):
            gathered.leave_folder(kind, below or path)
            continue
        if not below:
            gathered.note("", names)
        skipped = RUN_PARTS if kind is RUN else frozenset()
        for item in listed:
            name = f"{below}/{item.name}" if below else item.name
            if _is_folder(item):
                reason = folder_kind(item.name) or (RUN_PART if item.name in skipped else None)
                if reason is None:
                    pending.append((name, (*around, folder)))
                else:
                    gathered.leave_folder(reason, name)
            else:
                _file(item, name, gathered)


def _search_store(place: Place, gathered: Gathered) -> None:
    """Every file below ``place`` at a URL; if it is to sniff, the first bytes where names do not tell enough."""
    for name, size in place.files():
        gathered.meet(name, size)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        heads = pool.map(lambda file: bytes(place.read_range(file[0], 0, min(file[2], HEAD))), gathered.unsure)
        for (name, named, size), head in zip(gathered.unsure, heads, strict=True):
            gathered.judge(name, named, size, look=partial(bytes, head))
        weights = gathered.weights_beside_pictures() if gathered.sniff else []
        heads = pool.map(lambda file: bytes(place.read_range(file[0], 0, min(file[1], HEAD))), weights)
        for (name, size), head in zip(weights, heads, strict=True):
            gathered.named(name, size, partial(bytes, head))


def _listed(path: str) -> tuple[list[os.DirEntry[str]], _Folder]:
    try:
        with os.scandir(path) as items:
            listed = sorted(items, key=lambda item: item.name)
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror})") from None
    return listed, (status.st_dev, status.st_ino)


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link in a circle, or into a folder that may not be entered
        return False


def _file(item: os.DirEntry[str], name: str, gathered: Gathered) -> None:
    named = gathered.named(name, look=partial(_head_of_file, item.path))
    if isinstance(named, Kind):  # most that is no image: without asking the file system
        gathered.leave(named, name)
        return
    image = named == "image"
    try:
        status = item.stat()
    except OSError as error:
        if not image:
            gathered.leave(_DEAD, name)
            return
        raise DataError(f"{item.path}: cannot be read ({error.strerror}). {_mending(item.path)}") from None
    if stat.S_ISREG(status.st_mode):
        gathered.judge(name, named, status.st_size, look=lambda: _head(item.path))
    elif image:
        raise DataError(f"{item.path}: got a pipe or device, expected an image file. Remove or rename it")
    else:
        gathered.leave(_SPECIAL, name)


def _head(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(HEAD)


def _head_of_file(path: str) -> bytes:
    """Nothing of a pipe, which would be waited for."""
    return _head(path) if os.path.isfile(path) else b""


def _mending(path: str) -> str:
    if os.path.islink(path) and ".git/annex/" in os.readlink(path):
        return "It is a link of git-annex to a file that is not here: git annex get"
    return "If it is a dead link, remove it"


def _is_hub_cache(path: str, names: set[str]) -> bool:
    """A repository in Hugging Face's cache, where each image is once in blobs/ and again in every snapshot."""
    if not {"blobs", "snapshots"} <= names:
        return False
    try:
        revisions = [name for name in os.listdir(os.path.join(path, "snapshots")) if not name.startswith(".")]
    except OSError:
        return False
    return bool(revisions) and all(map(_REVISION.fullmatch, revisions))
