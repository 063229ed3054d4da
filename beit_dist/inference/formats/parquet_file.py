"""Tables in Parquet: what pandas, polars, DuckDB and Hugging Face's datasets read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from beit_dist.errors import ConfigError
from beit_dist.inference.formats.table import METADATA, WINDOW, Block, Column, Sink, Table
from beit_dist.storage.place import Place
from beit_dist.storage.streams import open_ranges

_GROUP_BYTES = 64 << 20
"""Of a row group's numbers, about: it is held in memory when it is written and read."""


class ParquetFile:
    """Vectors are lists of a fixed size; the metadata are JSON under ``beit_dist`` in the schema's."""

    suffix: ClassVar[str] = ".parquet"

    @staticmethod
    def check() -> None:
        """Refuse the format where its package is missing.

        Raises:
            ConfigError: pyarrow is not installed.
        """
        _pyarrow()

    @staticmethod
    def write(table: Table, place: Place, name: str) -> None:
        """Write a table, a row group at a time."""
        pyarrow = _pyarrow()
        fields = [pyarrow.field(column.title, _type(pyarrow, column)) for column in table.columns]
        schema = pyarrow.schema(fields, {METADATA: json.dumps(table.metadata)})
        texts = [column.title for column in table.columns if column.kind == "text"]
        with (
            place.writing(name) as file,
            pyarrow.parquet.ParquetWriter(Sink(file), schema, use_dictionary=texts) as writer,
        ):
            for blocks in _groups(table):
                columns = [_joined(pyarrow, column, blocks) for column in table.columns]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))

    @staticmethod
    def metadata(place: Place, name: str) -> dict[str, Any]:
        """Those of a file that we have written.

        Raises:
            ValueError, KeyError, OSError: it is another's, or damaged.
        """
        pyarrow = _pyarrow()
        with open_ranges(place, name, WINDOW) as file:
            said = pyarrow.parquet.read_schema(file).metadata[METADATA.encode()]
        found: dict[str, Any] = json.loads(said)
        return found


def vectors(file: BinaryIO, title: str) -> Iterator[NDArray[np.float32]]:
    """The rows of a column of vectors, (n, width) each."""
    table = _pyarrow().parquet.ParquetFile(file)
    for group in range(table.num_row_groups):
        column = table.read_row_group(group, columns=[title], use_threads=False).column(0)
        for chunk in column.chunks:
            yield chunk.flatten().to_numpy().reshape(len(chunk), -1)


def texts(file: BinaryIO, titles: Sequence[str], rows: Sequence[int]) -> list[dict[str, str | None]]:
    """The texts of some rows."""
    table = _pyarrow().parquet.ParquetFile(file)
    ends = np.cumsum([table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)])
    held: dict[int, dict[str, str | None]] = {}
    for group in sorted({int(np.searchsorted(ends, row, "right")) for row in rows}):
        start = int(ends[group - 1]) if group else 0
        within = sorted(row for row in set(rows) if start <= row < ends[group])
        read = table.read_row_group(group, columns=list(titles), use_threads=False)
        for row, values in zip(within, read.take([row - start for row in within]).to_pylist(), strict=True):
            held[row] = values
    return [held[row] for row in rows]


def titles_of(file: BinaryIO) -> list[str]:
    """The names of all columns."""
    return [str(name) for name in _pyarrow().parquet.read_schema(file).names]


def _groups(table: Table) -> Iterator[list[Block]]:
    """Blocks that become one row group each."""
    row = sum(4 * max(1, column.width) for column in table.columns if column.kind != "text")
    most = max(1, _GROUP_BYTES // max(1, row))
    group: list[Block] = []
    for block in table.blocks():
        group.append(block)
        if sum(block.rows for block in group) >= most:
            yield group
            group = []
    if group or not table.rows:
        yield group


def _joined(pyarrow: Any, column: Column, blocks: Sequence[Block]) -> Any:
    kind = _type(pyarrow, column)
    if column.kind == "text":
        return pyarrow.array([text for block in blocks for text in block.text(column.title)], kind)
    empty = [np.zeros((0, column.width) if column.width else 0, np.float32)]
    values = np.concatenate([block.array(column.title) for block in blocks] or empty)
    flat = pyarrow.array(values.reshape(-1), pyarrow.float32())
    return pyarrow.FixedSizeListArray.from_arrays(flat, type=kind) if column.kind == "vector" else flat


def _type(pyarrow: Any, column: Column) -> Any:
    if column.kind == "text":
        return pyarrow.string()
    return pyarrow.list_(pyarrow.float32(), column.width) if column.kind == "vector" else pyarrow.float32()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "pyarrow",
            None,
            "this package, for .parquet",
            "pip install 'beit_dist[parquet]', or use another suffix.",
        ) from None
    return pyarrow
