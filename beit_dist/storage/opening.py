"""From a path or a URL to the place it names: one table says which class of place is behind a scheme."""

from __future__ import annotations

import os
from collections.abc import Callable
from urllib.parse import urlsplit

import fsspec

from beit_dist.errors import ConfigError
from beit_dist.storage.access import Access
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.place import Place, is_url, shown
from beit_dist.storage.remote import RemotePlace
from beit_dist.storage.s3 import S3Place
from beit_dist.storage.web import WebPlace

STORES: dict[str, Callable[[str, Access], Place]] = {
    "file": LocalPlace.at,
    "s3": S3Place,
    "s3a": S3Place,
    "http": WebPlace,
    "https": WebPlace,
}
"""What opens a URL of each scheme. Any other scheme is one of fsspec's, and a :class:`RemotePlace`."""


def as_place(where: str | os.PathLike[str] | Place, access: Access | None = None) -> Place:
    """``where`` itself if it is a place, else the place that it names."""
    return where if isinstance(where, Place) else open_place(where, access)


def open_place(where: str | os.PathLike[str], access: Access | None = None, field: str = "url") -> Place:
    """The folder ``where``: a path or a URL. Nothing is asked of a store.

    Args:
        where: the path or URL.
        access: how a URL is reached.
        field: the setting that names it, for messages.

    Raises:
        ConfigError: it is no place, holds credentials, or is in a store that nothing installed reaches.
    """
    text = os.fspath(where)
    scheme, separator, rest = text.partition(":")
    if not is_url(text):
        if separator and scheme in STORES and scheme != "file":
            raise ConfigError(
                field, text, f"{scheme}:// with two slashes", f"For a local folder of that name, write ./{text}."
            )
        return STORES["file"](text, access or Access())
    _check_url(field, text)
    scheme = scheme.lower()
    if scheme not in STORES:
        _check_fsspec(field, scheme, text)
    try:
        return STORES.get(scheme, RemotePlace)(f"{scheme}:{rest}", access or Access())
    except ConfigError as error:  # of a place's own, which cannot know the setting
        raise error.named(field) from None


def check_place(field: str, where: str, *, written: bool = False) -> None:
    """Refuse what :func:`open_place` refuses.

    Args:
        written: files will be written there.

    Raises:
        ConfigError: of ``field``.
    """
    place = open_place(where, field=field)
    if written and not place.takes_files:
        raise ConfigError(field, where, "a folder or an object store", "Web servers take no files.")


def place_of(file: str, access: Access | None = None) -> tuple[Place, str]:
    """A place that ``file``, a path or URL, lies in or below, and its name there.

    At a URL that is the bucket or host: a key may have empty parts (``a//b.jpg``), which a folder's name loses.

    Raises:
        ConfigError: see :func:`open_place`.
    """
    root, slash, name = file.rpartition("/")
    if is_url(file) and (host := urlsplit(file).netloc):
        root = file[: file.index("://") + len("://") + len(host)]
        name = file[len(root) + 1 :]
    return open_place(root or slash or ".", access), name


def _check_url(field: str, url: str) -> None:
    """Refuse what names no place, or holds credentials, which would end up in copies of the recipe."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise ConfigError(
            field,
            shown(url),
            "a URL without user, password and query",
            "Set credentials in the environment (AWS_ACCESS_KEY_ID, ...) or in the client's own files.",
        )
    if "::" in url or parts.scheme == "pipe" or not (parts.netloc or parts.path.strip("/")):
        raise ConfigError(field, shown(url), "a folder, or a URL such as s3://bucket/folder")


def _check_fsspec(field: str, scheme: str, url: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        known = ", ".join(f"{name}://" for name in STORES)
        raise ConfigError(
            field, shown(url), f"{known}, or another scheme that fsspec knows", "Is it spelled correctly?"
        ) from None
    except ImportError as error:
        raise ConfigError(
            field, shown(url), f"an installed package that reaches {scheme}://", f"{error} ({error.__cause__})."
        ) from None
