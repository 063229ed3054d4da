"""The kinds of sources, a line each. What is no folder is known by its content here, and by its name at a URL."""

from __future__ import annotations

from beit_dist.errors import DataError
from beit_dist.images.source import Source
from beit_dist.images.sources.folder import Folder
from beit_dist.images.sources.parquet import Parquet
from beit_dist.images.sources.tar import Tar
from beit_dist.images.sources.zip import Zip

SOURCES: tuple[type[Source], ...] = (
    Folder,
    Tar,
    Zip,
    Parquet,
)

FILES = tuple(kind for kind in SOURCES if kind.suffixes)
"""Those that are files."""

EXPECTED = f"a folder, {', '.join(kind.kind for kind in FILES[:-1])} or {FILES[-1].kind}"
"""For messages."""


def source_of(kind: str, path: str) -> Source:
    """The source that a frozen list names.

    Raises:
        DataError: there is no such kind.
    """
    for source in SOURCES:
        if source.kind == kind:
            return source(path)
    known = ", ".join(source.kind for source in SOURCES)
    raise DataError(f"{path}: got the kind {kind!r}, expected {known}. Use the version that froze the list")
