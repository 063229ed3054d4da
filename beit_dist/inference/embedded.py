"""Files that ``beit embed`` has written, read again: vectors a block at a time, and the names of some rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit_dist.errors import ConfigError, StorageError
from beit_dist.inference.embedding import Embedding
from beit_dist.inference.formats import npz_file, parquet_file
from beit_dist.inference.formats.table import WINDOW
from beit_dist.inference.target import FORMATS
from beit_dist.storage.access import Access
from beit_dist.storage.opening import place_of
from beit_dist.storage.place import Place
from beit_dist.storage.streams import open_ranges

_READERS = {".parquet": parquet_file, ".npz": npz_file}


class Row(NamedTuple):
    """Which image a row is of."""

    source: str
    name: str
    label: str | None


@dataclass(frozen=True)
class Embedded:
    """A file of features."""

    place: Place
    name: str
    metadata: dict[str, Any]

    def __str__(self) -> str:
        return f"{str(self.place).rstrip('/')}/{self.name}"

    @property
    def facts(self) -> dict[str, Any]:
        """Of the job that has made it."""
        facts: dict[str, Any] = self.metadata["facts"]
        return facts

    def vectors(self, title: str) -> Iterator[NDArray[np.float32]]:
        """The rows of a column, (n, width) each."""
        with open_ranges(self.place, self.name, WINDOW) as file:
            yield from self._reader.vectors(file, title)

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Some rows."""
        with open_ranges(self.place, self.name, WINDOW) as file:
            known = self._reader.titles_of(file)
            titles = [name for name in Row._fields if name in known]
            found = self._reader.texts(file, titles, numbers)
        return [Row(each["source"] or "", each["name"] or "", each.get("label")) for each in found]

    @property
    def _reader(self) -> Any:
        return _READERS[self.name[self.name.rindex(".") :].lower()]


def open_embedded(where: str, access: Access) -> Embedded:
    """A file that ``beit embed`` has written.

    Raises:
        ConfigError: it is not there, or is none.
    """
    suffix = next((each for each in _READERS if where.lower().endswith(each)), None)
    place, name = place_of(where, access)
    if suffix is None or not place.exists(name):
        reason = "" if suffix is None else " (there is none of that name)"
        raise ConfigError("--embedded", where, f"a file of beit embed, .parquet or .npz{reason}")
    FORMATS[suffix].check()
    try:
        metadata = FORMATS[suffix].metadata(place, name)
        if metadata["facts"]["made"] != Embedding.made:
            raise ValueError
    except (StorageError, ConfigError):
        raise
    except Exception:  # a reader of any format meets what may be anything
        raise ConfigError("--embedded", where, "a file of beit embed (this one is not, or is damaged)") from None
    return Embedded(place, name, metadata)


def check_same(embedded: Embedded, work: Embedding) -> None:
    """Refuse features of another model.

    Raises:
        ConfigError: they are.
    """
    facts, model = embedded.facts, work.model
    if facts["weights"] != model.provenance.digest:
        raise ConfigError(
            "--embedded",
            str(embedded),
            f"features of {model.provenance.name} (they are of {embedded.metadata['model']}, other weights)",
            "Name the model that made it, or embed the images once more.",
        )
    own = model.prepare.config.model_dump(mode="json")
    if facts["model"] != own or facts["crop"] != work.facts["crop"]:
        raise ConfigError("--embedded", str(embedded), "features of the same image size and crop", "Embed anew.")
