"""Parquet files of a Hugging Face image data set: a column of images, row by row, and maybe one of labels.

Listing reads footers and labels, not images. Reading an image reads its row group, of which the last is kept:
rows in order cost each group once, rows in the order of a frozen list a group each.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, BinaryIO

from beit_dist.errors import ConfigError, DataError
from beit_dist.images.file_bytes import open_file
from beit_dist.images.gathering import Entry, Gathered
from beit_dist.images.left_out import Kind
from beit_dist.images.rejection import ChangedError
from beit_dist.images.source import Source, first_line, searched
from beit_dist.storage.access import Access

_MAGIC = b"PAR1"
_WINDOW = 64 << 10
"""Bytes of a request at a URL: most footers take one."""
_OPEN = 64
"""Files of a process whose footers are kept."""
_DIGITS = 6
"""Of a row's number in its image's name, at least."""
_EMPTY = Kind(
    "row without an image",
    "rows without an image",
    "embed the images' bytes, as push_to_hub of the datasets package does",
)


class Parquet(Source):
    """One parquet file; images are named by the file's own name and their row."""

    kind = "parquet"
    suffixes = (".parquet",)
    position = ("group", "row")

    @classmethod
    def recognises(cls, file: BinaryIO) -> bool:
        return file.read(len(_MAGIC)) == _MAGIC

    def search(self, found: Gathered, access: Access) -> None:
        """Every row; ``Entry.size`` is the size of the row group's images in the file."""
        name = os.path.basename(self.path)
        with searched(self.path), _damage(self.path), open_file(self.path, access, _WINDOW) as file:
            table = _Table(self.path, file)
            digits = max(_DIGITS, len(str(table.rows - 1)))
            number = 0
            for group in range(table.groups):
                size, empty = table.size(group), table.empty_rows(group)
                for row, label in enumerate(table.labels(group)):
                    image = f"{name}/{number:0{digits}d}"
                    if row in empty:
                        found.leave(_EMPTY, image)
                    else:
                        found.take(image, size, (group, row), label)
                    number += 1

    def read(self, entry: Entry, access: Access) -> bytes:
        group, row = entry.at
        with _damage(self.path):
            image = opened.image(self.path, access, group, row, entry.size)
        if image is None:
            raise ChangedError(f"no image in row {row} of row group {group}, whose images had {entry.size} bytes")
        return image


class _Table:
    """An open file, as far as its images are concerned."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        pyarrow = _pyarrow(path)
        self._path, self._file, self._types = path, pyarrow.parquet.ParquetFile(file), pyarrow.types
        self._schema = self._file.schema_arrow
        self.column = self._image_column()

    @property
    def rows(self) -> int:
        """Of the whole file."""
        return int(self._file.metadata.num_rows)

    @property
    def groups(self) -> int:
        """Row groups."""
        return int(self._file.metadata.num_row_groups)

    def size(self, group: int) -> int:
        """Bytes that the images of a row group take in the file; -1 if there is no such group."""
        return int(self._chunk(group).total_compressed_size) if group < self.groups else -1

    def images(self, group: int) -> Any:
        """The images of a row group, as a column of pyarrow's."""
        return self._read(group, f"{self.column}.bytes")

    def empty_rows(self, group: int) -> set[int]:
        """Rows of a group without an image; read only where the footer does not rule them out."""
        said = self._chunk(group).statistics
        if said is not None and said.has_null_count and said.null_count == 0:
            return set()
        return {row for row, image in enumerate(self.images(group)) if _bytes(image) is None}

    def labels(self, group: int) -> Iterator[str]:
        """The label of each row, empty for none."""
        if not self._has_labels:
            yield from [""] * self._file.metadata.row_group(group).num_rows
            return
        for label in self._read(group, "label").to_pylist():
            if isinstance(label, int) and self._label_names:
                # Hugging Face marks the rows of a test split by -1.
                yield self._label_names[label] if 0 <= label < len(self._label_names) else ""
            else:
                yield "" if label is None or label == -1 else str(label)

    def _read(self, group: int, column: str) -> Any:
        return self._file.read_row_group(group, columns=[column], use_threads=False).column(0)

    def _chunk(self, group: int) -> Any:
        found = self._file.metadata.row_group(group)
        chunks = map(found.column, range(found.num_columns))
        return next(chunk for chunk in chunks if chunk.path_in_schema == f"{self.column}.bytes")

    def _image_column(self) -> str:
        found = [str(field.name) for field in self._schema if self._holds_images(field.type)]
        if "image" in found or len(found) == 1:
            return "image" if "image" in found else found[0]
        if found:
            got, way_out = f"{len(found)} of them: {', '.join(found)}", "Rename one of them to image."
        else:
            got, way_out = (
                f"the columns {', '.join(self._schema.names)}",
                "Or write the images to a folder, tar or zip.",
            )
        expected = f"a column called image, or a single column, of struct{{bytes, path}} (the file has {got})"
        raise ConfigError("--images", self._path, expected, way_out)

    def _holds_images(self, kind: Any) -> bool:
        if not self._types.is_struct(kind) or kind.get_field_index("path") < 0:
            return False
        at = kind.get_field_index("bytes")
        return at >= 0 and bool(self._types.is_binary(kind[at].type) or self._types.is_large_binary(kind[at].type))

    @cached_property
    def _has_labels(self) -> bool:
        at, types = self._schema.get_field_index("label"), self._types
        return at >= 0 and any(
            is_one(self._schema.field(at).type) for is_one in (types.is_integer, types.is_string)
        )

    @cached_property
    def _label_names(self) -> list[str]:
        """What Hugging Face's metadata call the classes; empty where they do not."""
        said = (self._schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            names = json.loads(said)["info"]["features"]["label"]["names"]
        except (ValueError, KeyError, TypeError):
            return []
        return [str(name) for name in names] if isinstance(names, list) else []


class _Opened:
    """Open files of this process, and the row group that was read last. One group at a time is in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: dict[str, _Table] = {}
        self._at: tuple[str, int] | None = None
        self._images: Any = None

    def image(self, path: str, access: Access, group: int, row: int, size: int) -> bytes | None:
        """None: there is no such row, or the images of its group have another size."""
        with self._lock:
            table = self._tables.pop(path, None) or _Table(path, open_file(path, access, _WINDOW))
            self._tables[path] = table
            if len(self._tables) > _OPEN:
                del self._tables[next(iter(self._tables))]
            if table.size(group) != size:
                return None
            if self._at != (path, group):
                self._at = self._images = None  # the old group's memory is free before the new one takes its own
                self._images = table.images(group)
                self._at = (path, group)
            return _bytes(self._images[row]) if row < len(self._images) else None

    def forget(self) -> None:
        """Close all files."""
        with self._lock:
            self._tables.clear()
            self._at = self._images = None


opened = _Opened()
"""Of this process."""


def _bytes(image: Any) -> Any:
    """None for a row without an image."""
    held = image.as_py()
    return None if held is None else held["bytes"]


@contextmanager
def _damage(path: str) -> Iterator[None]:
    """Turn what pyarrow raises for damage into an error for the user."""
    pyarrow = _pyarrow(path)
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # of the file system or the store
        raise DataError(f"{path}: damaged or cut short ({first_line(error)}). Copy it again") from None


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "--images", path, "the package pyarrow, which reads parquet", "pip install 'beit_dist[parquet]'"
        ) from None
    return pyarrow
