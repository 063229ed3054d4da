"""Tables in NumPy's ``.npz``: an array for each column, stored as it is, so that NumPy alone reads them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from beit_dist.inference.formats.table import METADATA, WINDOW, Column, Sink, Table
from beit_dist.storage.place import Place
from beit_dist.storage.streams import open_ranges

_DATE = (1980, 1, 1, 0, 0, 0)
"""Of every member: the same table gives the same bytes."""
_AT_ONCE = 1 << 24
"""Bytes that are read at a time."""


class NpzFile:
    """Texts are arrays of ``<U``, empty where there is none; the metadata are JSON in ``beit_dist``."""

    suffix: ClassVar[str] = ".npz"

    @staticmethod
    def check() -> None:
        """NumPy is always there."""

    @staticmethod
    def write(table: Table, place: Place, name: str) -> None:
        """Write a table, column by column: for each its blocks are made once more, but only what it needs."""
        with (
            place.writing(name) as file,
            zipfile.ZipFile(cast(BinaryIO, Sink(file)), "w", zipfile.ZIP_STORED) as archive,
        ):
            for column in table.columns:
                _write(archive, column, table)
            said = np.array(json.dumps(table.metadata))
            with _member(archive, METADATA) as member:
                np.lib.format.write_array(member, said, allow_pickle=False)

    @staticmethod
    def metadata(place: Place, name: str) -> dict[str, Any]:
        """Those of a file that we have written.

        Raises:
            ValueError, KeyError, OSError: it is another's, or damaged.
        """
        try:
            with (
                open_ranges(place, name, WINDOW) as file,
                zipfile.ZipFile(file) as archive,
                archive.open(f"{METADATA}.npy") as member,
            ):
                found: dict[str, Any] = json.loads(str(np.lib.format.read_array(member, allow_pickle=False)))
        except zipfile.BadZipFile as error:
            raise ValueError(str(error)) from None
        return found


def vectors(file: BinaryIO, title: str) -> Iterator[NDArray[np.float32]]:
    """The rows of a column of vectors, (n, width) each."""
    yield from _rows(file, title)


def texts(file: BinaryIO, titles: Sequence[str], rows: Sequence[int]) -> list[dict[str, str | None]]:
    """The texts of some rows."""
    held: dict[int, dict[str, str | None]] = {row: {} for row in rows}
    for title in titles:
        start = 0
        for block in _rows(file, title):
            for row in held:
                if start <= row < start + len(block):
                    held[row][title] = str(block[row - start]) or None
            start += len(block)
    return [held[row] for row in rows]


def titles_of(file: BinaryIO) -> list[str]:
    """The names of all columns."""
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    return [name for name in names if name != METADATA]


def _write(archive: zipfile.ZipFile, column: Column, table: Table) -> None:
    title = column.title
    if column.kind == "text":
        longest = max((len(text or "") for block in table.blocks() for text in block.text(title)), default=0)
        kind: np.dtype[Any] = np.dtype(f"<U{max(1, longest)}")
    else:
        kind = np.dtype("<f4")
    shape = (table.rows, column.width) if column.kind == "vector" else (table.rows,)
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    with _member(archive, title) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for block in table.blocks():
            if column.kind == "text":
                values = np.array([text or "" for text in block.text(title)], kind)
            else:
                values = np.ascontiguousarray(block.array(title), kind)
            member.write(values.tobytes())


def _member(archive: zipfile.ZipFile, title: str) -> Any:
    return archive.open(zipfile.ZipInfo(f"{title}.npy", _DATE), "w", force_zip64=True)


def _rows(file: BinaryIO, title: str) -> Iterator[NDArray[Any]]:
    """An array of a file, some rows at a time."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{title}.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, kind = np.lib.format.read_array_header_1_0(member)
        row = kind.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        some = max(1, _AT_ONCE // row)
        for first in range(0, shape[0], some):
            count = min(some, shape[0] - first)
            yield np.frombuffer(member.read(count * row), kind).reshape(count, *shape[1:])
