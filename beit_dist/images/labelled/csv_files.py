"""Lists of images with their labels: CSV files with the header ``path,label``."""

from __future__ import annotations

import csv
import io
import os
import posixpath

from beit_dist.errors import ConfigError, DataError, StorageError, printable
from beit_dist.images.file_bytes import read_whole
from beit_dist.images.gathering import Entry
from beit_dist.images.sources.folder import Folder
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import is_url

_COLUMNS = ("path", "label")


def is_csv(spec: str) -> bool:
    """Whether a source, as a user names it, is such a list."""
    return spec.lower().endswith(".csv")


def listed_in(spec: str, number: int, access: Access) -> tuple[Folder, list[Entry]]:
    """The folder of a list, and its images as files of that folder.

    Args:
        spec: path or URL of the list. Paths in it are relative to the folder it lies in.
        number: of the folder among the sources.
        access: how URLs are reached.

    Raises:
        ConfigError: there is no such list.
        DataError: it has no such header, a row without path or label, a path twice, or a file that is not there.
    """
    spec = spec.removeprefix("file://")
    path = spec if is_url(spec) else os.path.abspath(spec)
    rows = _rows(path, access)
    root, below = _around(path.rpartition("/")[0], [name for _, name, _ in rows])
    labels: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, name, label in rows:
        name = posixpath.normpath(posixpath.join(below, name))
        if name in labels:
            raise DataError(
                f"{path}, line {line}: {printable(name)} again, as in line {lines[name]}. Remove one of them"
            )
        labels[name], lines[name] = label, line
    sizes = open_place(root, access).sizes(list(labels))
    if missing := next((name for name in labels if name not in sizes), None):
        raise DataError(
            f"{path}, line {lines[missing]}: {printable(missing)} is not in {root}. Paths are relative to the list"
        )
    return Folder(root), [
        Entry(os.fsencode(name), number, (), sizes[name], label) for name, label in labels.items()
    ]


def _around(folder: str, names: list[str]) -> tuple[str, str]:
    """The folder that holds all files, as a store knows no ``..``; and the list's folder in it."""
    up = max((name.split("/").count("..") for name in names), default=0)
    parts = folder.split("/")
    return "/".join(parts[: len(parts) - up]) or "/", "/".join(parts[len(parts) - up :])


def _rows(path: str, access: Access) -> list[tuple[int, str, str]]:
    """(line, path, label) of each row."""
    try:
        text = read_whole(path, access).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8. Save it as UTF-8") from None
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or "not found"
        raise ConfigError("data", path, f"a CSV with the header path,label ({reason})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            got = printable(",".join(reader.fieldnames or ()))[:80]
            raise DataError(f"{path}: got the header {got!r}, expected path,label. Other columns are ignored")
        rows = []
        for row in reader:
            name, label = (row[column] or "" for column in _COLUMNS)
            if not name or not label:
                column = "path" if not name else "label"
                raise DataError(f"{path}, line {reader.line_num}: no {column}. Fill it in, or remove the row")
            rows.append((reader.line_num, posixpath.normpath(_relative(name, path)), label))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}. Save it as a CSV again") from None
    return rows


def _relative(name: str, path: str) -> str:
    """An absolute path of this machine as one relative to the list."""
    here = os.path.isabs(name) and not is_url(path)
    return os.path.relpath(name, os.path.dirname(path)) if here else name
