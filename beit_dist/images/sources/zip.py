"""Zips of images: their directory is read once, at a URL by ranges; then each image by its place."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections import Counter
from functools import partial
from typing import BinaryIO, NamedTuple

from beit_dist.errors import ConfigError, DataError
from beit_dist.images.file_bytes import open_file, ranges
from beit_dist.images.file_kinds import HEAD
from beit_dist.images.gathering import Entry, Gathered
from beit_dist.images.left_out import Kind
from beit_dist.images.rejection import ChangedError, damaged
from beit_dist.images.source import Source, searched
from beit_dist.storage.access import Access

_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""Of a member, and of the directory's end, with which an empty zip begins (APPNOTE 4.3.7, 4.3.16)."""
_ENCRYPTED = 1
_LOCAL, _DIRECTORY = 30, 46 + 22
"""Bytes of a member's header; of its entry in the directory and of the directory's end, without name and extra."""
_DAMAGE = (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, zlib.error)
_WINDOW = 64 << 10
"""Bytes of a request while the directory is looked for: with a short comment its end is in the last of them."""
_LINK = Kind("link in a zip", "links in zips", "pack the files that they lead to: zip without --symlinks")


class Zip(Source):
    """A zip whose members are stored or deflated."""

    kind = "zip"
    suffixes = (".zip",)
    position = ("offset", "packed", "crc32")

    @classmethod
    def recognises(cls, file: BinaryIO) -> bool:
        return file.read(4) in _MAGIC

    @property
    def _unpack(self) -> str:
        return f"Unpack it and name the folder: unzip {os.path.basename(self.path)} -d images."

    def search(self, found: Gathered, access: Access) -> None:
        with (
            searched(self.path, *_DAMAGE),
            open_file(self.path, access, _WINDOW) as file,
            zipfile.ZipFile(file) as archive,
        ):
            members = [member for member in archive.infolist() if not member.is_dir()]
            self._check_names(members)
            for member in members:
                self._meet(member, archive, found)

    def read(self, entry: Entry, access: Access) -> bytes:
        offset, packed, crc = entry.at
        read = ranges(self.path, access)
        changed = ChangedError(f"no image of {entry.size} bytes at byte {offset}")
        # How long the header is stands in itself. As its entry in the directory and the directory's end follow
        # behind the data, so many bytes are there in any case, and mostly suffice.
        spare = _LOCAL + _DIRECTORY + 2 * len(entry.text)
        raw = bytes(read(offset, spare + packed))
        header = _header(raw[:_LOCAL])
        if header is None or header.crc not in (0, crc):
            raise changed
        if header.length > spare:
            raw = bytes(read(offset, header.length + packed))
        content = raw[header.length : header.length + packed]
        if len(content) != packed:
            raise changed
        return _unpacked(content, header.method, entry.size, crc)

    def _check_names(self, members: list[zipfile.ZipInfo]) -> None:
        for name, times in Counter(member.filename for member in members).items():
            if times > 1:
                raise DataError(f"{self.path}: holds {name} {times} times. Pack it only once")

    def _meet(self, member: zipfile.ZipInfo, archive: zipfile.ZipFile, found: Gathered) -> None:
        if member.flag_bits & _ENCRYPTED:
            raise ConfigError(
                "--images", self.path, f"a zip that is not encrypted ({member.filename})", self._unpack
            )
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            other = f"{member.filename} has compression {member.compress_type}"
            raise ConfigError(
                "--images", self.path, f"a zip whose members are stored or deflated ({other})", self._unpack
            )
        name = member.filename.removeprefix("./")
        if stat.S_ISLNK(member.external_attr >> 16):
            found.leave(_LINK, name)
            return
        at = (member.header_offset, member.compress_size, member.CRC)
        found.meet(name, member.file_size, at, partial(_head, archive, member))


class _Header(NamedTuple):
    """A member's header (APPNOTE 4.3.7)."""

    method: int
    crc: int
    """0 where it follows the data."""
    length: int
    """Bytes, with name and extra field."""


def _header(raw: bytes) -> _Header | None:
    """None: this is none."""
    if len(raw) < _LOCAL or not raw.startswith(_MAGIC[0]):
        return None
    name, extra = _number(raw, 26, 2), _number(raw, 28, 2)
    return _Header(_number(raw, 8, 2), _number(raw, 14, 4), _LOCAL + name + extra)


def _number(raw: bytes, at: int, size: int) -> int:
    return int.from_bytes(raw[at : at + size], "little")


def _head(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(member) as file:
            return file.read(HEAD)
    except (zipfile.BadZipFile, zlib.error):  # of one member; whoever reads the image says more
        return b""


def _unpacked(raw: bytes, method: int, size: int, crc: int) -> bytes:
    if method == zipfile.ZIP_DEFLATED:
        try:
            raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, size + 1)
        except zlib.error as error:
            raise damaged(f"in its zip: {error}") from None
    if len(raw) != size or zlib.crc32(raw) != crc:
        raise damaged("its crc32 in the zip is another")
    return raw
