"""Files of weights at a URL, copied to this machine for as long as they are read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beit_dist.errors import WeightsError
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place, place_of
from beit_dist.storage.place import Place, is_url
from beit_dist.weights.foreign import INDICES, SETTINGS, WEIGHTS, is_foreign


@contextmanager
def here(source: str, access: Access) -> Iterator[Path | None]:
    """The file or folder of weights ``source`` on this machine; None where it is no such thing, but a run.

    Raises:
        StorageError: a store failed for as long as it was tried again.
        WeightsError: there is no such file.
    """
    if not is_url(source):
        yield Path(source) if is_foreign(source) else None
        return
    with tempfile.TemporaryDirectory(prefix="beit-weights-") as folder:
        yield _copied(source, access, Path(folder))


def _copied(source: str, access: Access, into: Path) -> Path | None:
    if is_foreign(source):
        place, name = place_of(source, access)
        _copy(place, name, into / Path(name).name)
        return into / Path(name).name
    place = open_place(source, access)
    there = place.sizes([*SETTINGS, *WEIGHTS, *INDICES])
    if not any(name in there for name in (*WEIGHTS, *INDICES)):
        return None
    for name in there:
        _copy(place, name, into / name)
    for index in (into / name for name in INDICES):
        for part in sorted(_parts(index)):
            _copy(place, part, into / part)
    return into


def _parts(index: Path) -> set[str]:
    """Files that an index names; what is wrong with it, its reader says."""
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in named if isinstance(name, str) and Path(name).name == name}


def _copy(place: Place, name: str, to: Path) -> None:
    try:
        with open(to, "wb") as file:
            for piece in place.chunks(name):
                file.write(piece)
    except FileNotFoundError:
        raise WeightsError(f"{place}/{name}: does not exist, expected a file of weights") from None
