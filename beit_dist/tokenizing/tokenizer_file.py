"""The tokenizer as a local file, wherever it lies."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from beit_dist.errors import SpaceError, StorageError, TokenizerError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import is_url


@contextlib.contextmanager
def tokenizer_at(where: str, access: Access) -> Iterator[Path]:
    """The path of a tokenizer; one at a URL is copied to a temporary folder for as long as the block lasts.

    Raises:
        TokenizerError: there is none at the URL.
        SpaceError: the folder of temporary files is too full for it.
    """
    if not is_url(where):
        yield Path(where)
        return
    folder, _, name = where.rpartition("/")
    place = open_place(folder, access)
    with tempfile.TemporaryDirectory(prefix="beit-tokenizer-") as scratch:
        try:
            size, free = place.size(name), shutil.disk_usage(scratch).free
            if size > free:
                raise SpaceError(
                    f"{scratch}: got {free / 1e9:.1f} GB of free space, expected {size / 1e9:.1f} GB for a copy "
                    "of the tokenizer. Set TMPDIR to another folder"
                )
            with open(Path(scratch, name), "wb") as file:
                for chunk in place.chunks(name):
                    file.write(chunk)
        except StorageError:
            raise
        except FileNotFoundError:
            raise TokenizerError(f"{place / name}: got no file, expected a tokenizer (.safetensors)") from None
        yield Path(scratch, name)
