"""Which kind of source a file is, by its content; a message says what any other file is, and the way out."""

from __future__ import annotations

import os

from beit_dist.errors import ConfigError, DataError, StorageError
from beit_dist.images.file_bytes import open_file
from beit_dist.images.file_kinds import HEAD, by_content
from beit_dist.images.source import Source
from beit_dist.images.sources.table import EXPECTED, FILES
from beit_dist.storage.access import Access

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def recognise(path: str, access: Access) -> Source:
    """The source at ``path``, which may be a URL.

    Raises:
        ConfigError: there is no such file, or it is something else.
        DataError: it is compressed.
    """
    try:
        with open_file(path, access) as file:
            start = file.read(HEAD)
            _refuse_compressed(path, start)
            for kind in FILES:
                file.seek(0)
                if kind.recognises(file):
                    return kind(path)
    except StorageError:
        raise
    except OSError as error:
        raise ConfigError("--images", path, f"{EXPECTED} of images ({error.strerror or 'not found'})") from None
    raise _other(path, start)


def _refuse_compressed(path: str, start: bytes) -> None:
    packed = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
    if packed is not None:
        raise DataError(
            f"{path}: compressed with {packed}, so its images cannot be read by position. Decompress it, "
            f"or extract it and name the folder: mkdir images && tar -xf {os.path.basename(path)} -C images"
        )


def _other(path: str, start: bytes) -> ConfigError:
    """The error for a file that is not a source."""
    kind = by_content(start)
    if kind == "image":
        return ConfigError("--images", path, f"{EXPECTED} (this file is an image)", "Name its folder.")
    if kind != "unknown":
        said = f"{EXPECTED} (this file is a {kind.one.removeprefix('.')})"
        return ConfigError("--images", path, said, f"{kind.way_out[:1].upper()}{kind.way_out[1:]}.")
    return ConfigError("--images", path, f"{EXPECTED} (this file is none of them)")
