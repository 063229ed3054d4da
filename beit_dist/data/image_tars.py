"""Image tars: where each image begins, by one scan of the headers; at a URL without fetching what lies between."""

from __future__ import annotations

import os
import tarfile
from typing import BinaryIO

from beit_dist.data.file_kinds import HEAD, by_content
from beit_dist.data.gathering import Gathered
from beit_dist.data.left_out import Kind
from beit_dist.errors import ConfigError, DataError, StorageError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import place_of
from beit_dist.storage.streams import open_ranges

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_END_BLOCKS = 1 << 20
"""Zero bytes after the last member that are ordinary padding (tar's blocking factor is rarely above 1 MiB)."""
_WINDOW = 32 << 10
"""Bytes of a request for a header: what is small beside it comes along, large images stay where they are."""

_DAMAGE = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
"""What tarfile raises for headers that are wrong or hostile."""
_LINK = Kind("link in a tar", "links in tars", "pack what they lead to: tar --dereference --hard-dereference")
_SPARSE = Kind("sparse file in a tar", "sparse files in tars", "pack them without --sparse")
_SPECIAL = Kind("device or the like in a tar", "devices and the like in tars")


def check_tar(path: str, access: Access) -> None:
    """Refuse what is no plain tar.

    Raises:
        ConfigError: there is no such file, or it is something else.
        DataError: it is compressed.
    """
    try:
        with _opened(path, access) as file:
            start = file.read(HEAD)
            file.seek(0)
            compressed = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
            plain = compressed is None and _is_tar(file)
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or "not found"
        raise ConfigError("--images", path, f"a folder or a tar of images ({reason})") from None
    if compressed is not None:
        raise DataError(
            f"{path}: compressed by {compressed}, so its images cannot be read by position. Decompress it, "
            f"or extract it and name the folder: mkdir images && tar -xf {os.path.basename(path)} -C images"
        )
    if not plain:
        kind = by_content(start)
        if kind == "image":
            raise ConfigError("--images", path, "a folder, or a tar (this file is an image)", "Name its folder.")
        if kind != "unknown":
            said = f"a folder, or a tar (this file is a {kind.one.removeprefix('.')})"
            raise ConfigError("--images", path, said, f"{kind.way_out[:1].upper()}{kind.way_out[1:]}.")
        raise ConfigError("--images", path, "a folder, or a tar (this file is none)")


def _is_tar(file: BinaryIO) -> bool:
    try:
        return tarfile.is_tarfile(file)
    except _DAMAGE:
        return True  # its first header is one, and has impossible numbers: the scan says more


def scan_tar(path: str, access: Access, gathered: Gathered) -> None:
    """Every member of a plain tar; links and sparse ones have no bytes of their own and are left out.

    Raises:
        DataError: the tar is damaged, cut short, or cannot be read.
    """
    try:
        with _opened(path, access) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                at = -1
                while (member := tar.next()) is not None:
                    if member.size < 0 or tar.offset <= at:  # some Pythons would go round in circles
                        raise tarfile.ReadError(f"a member at byte {member.offset} that ends before it begins")
                    if "size" in tar.pax_headers:  # it would be every member's, and tarfile half believes it
                        raise tarfile.ReadError("a global header that gives a size")
                    at = tar.offset
                    if not member.isdir():
                        _meet(member, file, gathered)
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every header
                end = tar.offset
            _check_end(file, path, end)
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged or cut short ({error}). Copy it again") from None
    except StorageError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _meet(member: tarfile.TarInfo, file: BinaryIO, gathered: Gathered) -> None:
    name = member.name.removeprefix("./")

    def look() -> bytes:
        file.seek(member.offset_data)  # where a header was fetched from a store, these bytes have come with it
        return file.read(min(HEAD, member.size))

    if member.isreg() and not member.issparse():
        gathered.meet(name, member.size, member.offset_data, look)
    else:
        named = gathered.named(name)
        special = _LINK if member.islnk() or member.issym() else _SPARSE if member.issparse() else _SPECIAL
        gathered.leave(named if isinstance(named, Kind) else special, name)


def _check_end(file: BinaryIO, path: str, end: int) -> None:
    """tarfile takes a damaged header, or the end of a truncated file, for the end of the archive."""
    file.seek(end)
    rest = file.read(_END_BLOCKS)
    if len(rest) < 512 or any(rest):
        reason = (
            "no closing block: cut short" if len(rest) < 512 else "other data behind its end: damaged or joined"
        )
        raise DataError(f"{path}: {reason} at byte {end}. Copy it again; give joined tars one by one")


def _opened(path: str, access: Access) -> BinaryIO:
    return open_ranges(*place_of(path, access), _WINDOW)
