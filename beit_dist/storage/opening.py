"""From a path or a URL to the place it names."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from beit_dist.storage.access import Access
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.place import Place, check_place, is_url
from beit_dist.storage.remote import RemotePlace


def as_place(where: str | os.PathLike[str] | Place, access: Access | None = None) -> Place:
    """``where`` itself if it is a place, else the place that it names."""
    return where if isinstance(where, Place) else open_place(where, access)


def open_place(where: str | os.PathLike[str], access: Access | None = None) -> Place:
    """The folder ``where``: a path, or a URL that fsspec knows.

    Raises:
        ConfigError: it is no place, or holds credentials.
    """
    text = os.fspath(where)
    if not is_url(text):
        return LocalPlace(Path(text.removeprefix("file://") if text.startswith("file:") else text))
    check_place("url", text)
    return RemotePlace(text, access or Access())


def place_of(file: str, access: Access | None = None) -> tuple[Place, str]:
    """A place that ``file``, a path or URL, lies in or below, and its name there.

    At a URL that is the bucket or host: a key may have empty parts (``a//b.jpg``), which a folder's name loses.

    Raises:
        ConfigError: it is no place, or holds credentials.
    """
    root, slash, name = file.rpartition("/")
    if is_url(file) and (host := urlsplit(file).netloc):
        root = file[: file.index("://") + len("://") + len(host)]
        name = file[len(root) + 1 :]
    return open_place(root or slash or ".", access), name
