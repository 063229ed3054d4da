"""Image tars: where each image begins, by one scan of the headers; at a URL without fetching what lies between."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from beit_dist.errors import ConfigError, DataError, StorageError, printable
from beit_dist.storage.access import Access
from beit_dist.storage.opening import place_of
from beit_dist.storage.streams import open_ranges

_log = logging.getLogger(__name__)

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_END_BLOCKS = 1 << 20
"""Zero bytes after the last member that are ordinary padding (tar's blocking factor is rarely above 1 MiB)."""
_WINDOW = 32 << 10
"""Bytes of a request for a header: what is small beside it comes along, large images stay where they are."""

_DAMAGE = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
"""What tarfile raises for headers that are wrong or hostile."""


class Member(NamedTuple):
    """An image in a tar."""

    name: str
    offset: int
    size: int


def check_tar(path: str, access: Access) -> None:
    """Refuse what is no plain tar.

    Raises:
        ConfigError: there is no such file, or it is something else.
        DataError: it is compressed.
    """
    try:
        with _opened(path, access) as file:
            start = file.read(8)
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
        raise ConfigError("--images", path, "a folder, or a tar (this file is none)")


def _is_tar(file: BinaryIO) -> bool:
    try:
        return tarfile.is_tarfile(file)
    except _DAMAGE:
        return True  # its first header is one, and has impossible numbers: the scan says more


def scan_tar(path: str, access: Access, is_image: Callable[[str], bool]) -> Iterator[Member]:
    """The image members of a plain tar; links and sparse ones, which have no bytes of their own, are warned of.

    Raises:
        DataError: the tar is damaged, cut short, or cannot be read.
    """
    left_out: list[str] = []
    try:
        with _opened(path, access) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                at = -1
                while (member := tar.next()) is not None:
                    if member.size < 0 or tar.offset <= at:  # some Pythons would go round in circles
                        raise tarfile.ReadError(f"a member at byte {member.offset} that ends before it begins")
                    at = tar.offset
                    name = member.name.removeprefix("./")
                    if not is_image(name):
                        pass
                    elif member.isreg() and not member.issparse():
                        yield Member(name, member.offset_data, member.size)
                    elif not member.isdir():
                        left_out.append(name)
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every header
                end = tar.offset
            _check_end(file, path, end)
            if left_out:
                _log.warning(
                    "%s: %d members named like images are left out, being links, sparse or devices; first %s",
                    path,
                    len(left_out),
                    printable(left_out[0]),
                )
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged or cut short ({error}). Copy it again") from None
    except StorageError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


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
