"""A table with a row for each image, longer than memory: what every format of file writes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

METADATA = "beit_dist"
"""What the metadata are called in a file."""


WINDOW = 64 << 10
"""Bytes of a request at a URL, where a file's metadata are read."""


class Column(NamedTuple):
    """One column."""

    name: str
    kind: Literal["text", "number", "vector"]
    """str or None; fp32; fp32 (width,)."""
    width: int = 0
    place: int = 0
    """1 and up: the first, second, ... of several columns of that name."""

    @property
    def title(self) -> str:
        """Its name in a file, where each column has one of its own."""
        return f"{self.name}_{self.place}" if self.place else self.name


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of a table."""

    rows: int
    columns: Mapping[str, Callable[[], Any]]
    """By title, what computes or reads the values: a list, (rows,) or (rows, width)."""

    def text(self, title: str) -> list[str | None]:
        """The values of a column of text."""
        values: list[str | None] = self.columns[title]()
        return values

    def array(self, title: str) -> NDArray[np.float32]:
        """The values of any other column."""
        values: NDArray[np.float32] = self.columns[title]()
        return values


@dataclass(frozen=True)
class Table:
    """Rows in blocks, which are made anew each time they are asked for."""

    columns: tuple[Column, ...]
    rows: int
    blocks: Callable[[], Iterator[Block]]
    metadata: dict[str, Any]
    """As JSON takes it."""


class Sink(io.RawIOBase):
    """A file that is written from start to end, and knows how far it is."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self._at = file, 0

    def writable(self) -> bool:
        return True

    def write(self, content: ReadableBuffer, /) -> int:
        view = memoryview(content)
        self._file.write(view)
        self._at += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._at


def told(text: str) -> str:
    """Text as files hold it: what is not UTF-8 in a file's name becomes an escape, such as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()
