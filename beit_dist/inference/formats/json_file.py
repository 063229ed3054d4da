"""Tables in JSON: an object for each image, on a line of its own."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from beit_dist.inference.formats.table import Block, Table
from beit_dist.storage.place import Place
from beit_dist.storage.streams import open_stream

_DIGITS = 6
"""Behind the point."""


class JsonFile:
    """``{"metadata": {...}, "images": [...]}``; columns of which there are several are a list of objects."""

    suffix: ClassVar[str] = ".json"

    @staticmethod
    def check() -> None:
        """The format is always there."""

    @staticmethod
    def write(table: Table, place: Place, name: str) -> None:
        """Write a table."""
        with place.writing(name) as file:
            file.write(f'{{"metadata": {json.dumps(table.metadata)},\n"images": ['.encode())
            comma = b"\n"
            for block in table.blocks():
                for row in _objects(table, block):
                    file.write(comma + json.dumps(row).encode())
                    comma = b",\n"
            file.write(b"\n]}\n")

    @staticmethod
    def metadata(place: Place, name: str) -> dict[str, Any]:
        """Those of a file that we have written.

        Raises:
            ValueError, KeyError, OSError: it is another's, or damaged.
        """
        with open_stream(place, name) as file:
            line = file.readline().decode().rstrip("\n")
        found: dict[str, Any] = json.loads(line.removesuffix(",") + "}")["metadata"]
        return found


def _objects(table: Table, block: Block) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in range(block.rows)]
    for column in table.columns:
        values = block.text(column.title) if column.kind == "text" else block.array(column.title).tolist()
        for row, value in zip(rows, values, strict=True):
            said = round(value, _DIGITS) if isinstance(value, float) else value
            if not column.place:
                row[column.name] = said
                continue
            ranked = row.setdefault("classes", [])
            if len(ranked) < column.place:
                ranked.append({})
            ranked[-1][column.name] = said
    for row in rows:
        if "classes" in row:
            row["classes"] = [each for each in row["classes"] if None not in each.values()]
    return rows
