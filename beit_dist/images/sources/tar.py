"""Image tars: where each image begins, by one scan of the headers; at a URL without fetching what lies between.

A tar of tars, such as ImageNet's ILSVRC2012_img_train.tar with one tar for each class, stands for the tars in it:
they lie uncompressed in the outer one, so offsets add, and an inner tar's name is the folder of its images.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from beit_dist.errors import DataError
from beit_dist.images.file_bytes import middle, open_file, ranges
from beit_dist.images.file_kinds import HEAD
from beit_dist.images.gathering import Entry, Gathered
from beit_dist.images.left_out import Kind
from beit_dist.images.rejection import ChangedError
from beit_dist.images.source import Source, searched
from beit_dist.storage.access import Access
from beit_dist.storage.place import Buffer, is_url

_END_BLOCKS = 1 << 20
"""Zero bytes after the last member that are ordinary padding (tar's blocking factor is rarely above 1 MiB)."""
_AT_ONCE = 32
"""Inner tars that are scanned side by side at a URL."""
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = 64 << 10
"""Most bytes of a PAX header that are looked at; most have a kilobyte, access lists and the like can take more."""

_DAMAGE = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
"""What tarfile raises for headers that are wrong or hostile."""
_LINK = Kind(
    "link in a tar", "links in tars", "pack the files that they lead to: tar --dereference --hard-dereference"
)
_SPARSE = Kind("sparse file in a tar", "sparse files in tars", "pack them without --sparse")
_SPECIAL = Kind("device or pipe in a tar", "devices and pipes in tars")
_LABELS = (".cls", ".json")
"""Files with a sample's label, as webdataset writes them."""
_LABEL_NAMES = ("label", "cls")
"""What the label is called in such a JSON file."""
_MOST_LABEL = 1 << 20
"""Most bytes of one. Some JSON files hold more than a label."""


class Tar(Source):
    """A plain tar of images, or of tars of images."""

    kind = "tar"
    suffixes = (".tar",)
    position = ("offset",)

    @classmethod
    def recognises(cls, file: BinaryIO) -> bool:
        try:
            return tarfile.is_tarfile(file)
        except _DAMAGE:
            return True  # its first header is one, and has impossible numbers: the scan says more

    def search(self, found: Gathered, access: Access) -> None:
        """Every member; links and sparse ones have no bytes of their own and are left out."""
        with searched(self.path, *_DAMAGE), open_file(self.path, access) as file:
            inner = self._scan(file, found)
            # At a URL side by side: a header is read only when the one before it is known.
            with ThreadPoolExecutor(_AT_ONCE if is_url(self.path) else 1) as pool:
                for part in pool.map(lambda outer: self._scan_inner(outer, found.part(), access), inner):
                    found.absorb(part)

    def read(self, entry: Entry, access: Access) -> bytes:
        """Refuse an image whose header does not give the listed size.

        The tar was written anew since, and what lies there now would pass for a damaged image.
        """
        (offset,) = entry.at
        raw = _member(ranges(self.path, access), offset, entry.size)
        if len(raw) != entry.size:
            raise ChangedError(f"no image of {entry.size} bytes at byte {offset}")
        return raw

    def read_middle(self, entry: Entry, size: int, access: Access) -> bytes:
        return middle(self.path, entry.at[0], entry.size, size, access)

    def where(self, entry: Entry) -> str:
        return f"{self.path}, the image at byte {entry.at[0]}"

    def _scan(self, file: BinaryIO, found: Gathered) -> list[tarfile.TarInfo]:
        """The members, met; but the tars among them are returned where there is no image beside them."""
        inner: list[tarfile.TarInfo] = []
        for member in _members(file, self.path):
            if member.isreg() and not member.issparse() and member.name.lower().endswith(self.suffixes):
                inner.append(member)
            else:
                _meet(member, "", file, found)
        if found.images:  # the tars lie among images, as they might in a folder
            for member in inner:
                _meet(member, "", file, found)
            return []
        for name, times in Counter(map(_name, inner)).items():
            if times > 1:
                raise DataError(f"{self.path}: holds {name} {times} times. Pack it only once")
        return inner

    def _scan_inner(self, outer: tarfile.TarInfo, found: Gathered, access: Access) -> Gathered:
        folder, end = _name(outer)[: -len(".tar")] + "/", outer.offset_data + outer.size
        with open_file(self.path, access) as file:
            for member in _members(file, f"{self.path}: {outer.name}", outer.offset_data, end):
                _meet(member, folder, file, found)
        return found


def _members(file: BinaryIO, where: str, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The members, but for folders, of the tar from ``start`` to ``end`` (None: the file's), which is checked."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        at = -1
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= at:  # some Pythons would go round in circles
                raise tarfile.ReadError(f"a member at byte {member.offset} that ends before it begins")
            if end is not None and tar.offset > end:
                raise tarfile.ReadError(f"a member at byte {member.offset} that ends beyond its tar")
            if "size" in tar.pax_headers:  # it would be every member's, and tarfile half believes it
                raise tarfile.ReadError("a global header that gives a size")
            at = tar.offset
            if not member.isdir():
                yield member
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every header
        last = tar.offset
    _check_end(file, where, last, end)


def _name(member: tarfile.TarInfo) -> str:
    return member.name.removeprefix("./")


def _meet(member: tarfile.TarInfo, folder: str, file: BinaryIO, found: Gathered) -> None:
    name = folder + _name(member)

    def look() -> bytes:
        file.seek(member.offset_data)  # where a header was fetched from a store, these bytes have come with it
        return file.read(min(HEAD, member.size))

    if member.isreg() and not member.issparse():
        if found.labels and name.lower().endswith(_LABELS) and member.size <= _MOST_LABEL:
            file.seek(member.offset_data)
            label = _label(name, file.read(member.size))
            if label is not None:
                found.label(name, label, again=not name.lower().endswith(".json"))
        found.meet(name, member.size, (member.offset_data,), look)
    else:
        named = found.named(name)
        special = _LINK if member.islnk() or member.issym() else _SPARSE if member.issparse() else _SPECIAL
        found.leave(named if isinstance(named, Kind) else special, name)


def _label(name: str, raw: bytes) -> str | None:
    """What a file beside an image says of its class; None: nothing."""
    try:
        said = raw.decode("utf-8-sig").strip()
        if name.lower().endswith(".json"):
            fields = json.loads(said)
            found = [fields[key] for key in _LABEL_NAMES if key in fields] if isinstance(fields, dict) else []
            return str(found[0]) if found and isinstance(found[0], (str, int)) else None
    except (ValueError, RecursionError):
        return None
    return said


def _check_end(file: BinaryIO, where: str, last: int, end: int | None) -> None:
    """tarfile takes a damaged header, or the end of a truncated file, for the end of the archive."""
    file.seek(last)
    rest = file.read(_END_BLOCKS if end is None else min(_END_BLOCKS, end - last))
    if len(rest) < 512 or any(rest):
        reason = "no closing block: cut short" if len(rest) < 512 else "data after its end: damaged or joined"
        raise DataError(
            f"{where}: {reason} at byte {last}. Copy it again; if tars were joined, give them one by one"
        )


def _member(read: Callable[[int, int], Buffer], offset: int, size: int) -> bytes:
    """A tar's member; nothing if there is no header before it, or that of another size."""
    start = offset - tarfile.BLOCKSIZE
    try:
        raw = memoryview(read(start, tarfile.BLOCKSIZE + size))
        header, content = bytes(raw[: tarfile.BLOCKSIZE]), bytes(raw[tarfile.BLOCKSIZE :])
        said = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape").size
        if said != len(content):
            before = max(0, start - _EXTENDED)
            said = _extended_size(bytes(read(before, start - before)) + header)
    except (tarfile.TarError, ValueError):
        return b""
    return content if said == len(content) else b""


def _extended_size(headers: bytes) -> int:
    """The size in a PAX header before the last of ``headers``, where it may stand alone; -1 without one."""
    last = len(headers) - tarfile.BLOCKSIZE
    for at in range(last - 2 * tarfile.BLOCKSIZE, -1, -tarfile.BLOCKSIZE):
        try:
            header = tarfile.TarInfo.frombuf(
                headers[at : at + tarfile.BLOCKSIZE], tarfile.ENCODING, "surrogateescape"
            )
        except tarfile.HeaderError:  # a block of its records
            continue
        blocks = -(-header.size // tarfile.BLOCKSIZE)
        if header.type in _PAX and at + (1 + blocks) * tarfile.BLOCKSIZE == last:
            with tarfile.open(fileobj=io.BytesIO(headers[at:]), mode="r:") as tar:
                member = tar.next()
                return -1 if member is None else member.size
    return -1
