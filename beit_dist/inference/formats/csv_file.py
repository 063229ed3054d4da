"""Tables in CSV (RFC 4180): what spreadsheets read. The metadata lie in a file beside it."""

from __future__ import annotations

import csv
import io
import json
from typing import Any, ClassVar

from beit_dist.inference.formats.table import Block, Column, Table
from beit_dist.storage.place import Place

_BESIDE = ".metadata.json"


class CsvFile:
    """UTF-8, with a line of names first; names of files with line breaks or commas are in quotes."""

    suffix: ClassVar[str] = ".csv"

    @staticmethod
    def check() -> None:
        """The format is always there."""

    @staticmethod
    def write(table: Table, place: Place, name: str) -> None:
        """Write a table, and its metadata before it."""
        place.write(name + _BESIDE, json.dumps(table.metadata, indent=1).encode())
        with place.writing(name) as file:
            file.write(csv_lines([[column.title for column in table.columns]]))
            for block in table.blocks():
                columns = [_values(column, block) for column in table.columns]
                file.write(csv_lines(list(map(list, zip(*columns, strict=True)))))

    @staticmethod
    def metadata(place: Place, name: str) -> dict[str, Any]:
        """Those of a file that we have written.

        Raises:
            ValueError, OSError: it is another's, or damaged.
        """
        found: dict[str, Any] = json.loads(place.read(name + _BESIDE))
        return found


def _values(column: Column, block: Block) -> list[Any]:
    if column.kind == "text":
        return list(block.text(column.title))
    return [f"{value:.6f}" for value in block.array(column.title).tolist()]


def csv_lines(rows: list[list[Any]]) -> bytes:
    """Rows as a file has them."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
