"""Where a job's table goes: its file, and what lies beside it while it is made and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beit_dist.errors import ConfigError, StorageError
from beit_dist.inference.formats.csv_file import CsvFile
from beit_dist.inference.formats.json_file import JsonFile
from beit_dist.inference.formats.npz_file import NpzFile
from beit_dist.inference.formats.parquet_file import ParquetFile
from beit_dist.inference.formats.table import Table
from beit_dist.storage.access import Access
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place

FORMATS = {each.suffix: each for each in (ParquetFile, NpzFile, JsonFile, CsvFile)}
"""By the suffix of a file."""

_JOB = "job.json"


@dataclass(frozen=True)
class Target:
    """``F``; while it is made ``F.parts``; ``F.unreadable.csv`` if images are; of CSV, ``F.metadata.json``."""

    place: Place
    """The folder that ``F`` lies in."""
    name: str
    suffix: str

    def __str__(self) -> str:
        folder = str(self.place).rstrip("/")
        return self.name if folder == "." else f"{folder}/{self.name}"

    @property
    def parts(self) -> Place:
        """The folder of what is finished."""
        return self.place / f"{self.name}.parts"

    @property
    def unreadable(self) -> str:
        """Name of the list of images that cannot be read."""
        return f"{self.name}.unreadable.csv"

    def found(self) -> dict[str, Any] | None:
        """The facts of the job that has made the file; None where there is no file.

        Raises:
            ConfigError: it is no file of ours.
        """
        if not self.place.exists(self.name):
            return None
        try:
            facts: dict[str, Any] = FORMATS[self.suffix].metadata(self.place, self.name)["facts"]
        except (StorageError, ConfigError):
            raise
        except Exception:  # a reader of any format meets what may be anything
            raise ConfigError(
                "--out", str(self), "a new file (this one is there, and is not of this command)", "Name another."
            ) from None
        return facts

    def begun(self) -> dict[str, Any] | None:
        """The facts of a job that has been begun; None if there is none."""
        try:
            facts: dict[str, Any] = json.loads(self.parts.read(_JOB))
        except StorageError:
            raise
        except (OSError, ValueError):
            return None
        return facts

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Remember what the parts are of."""
        self.parts.make()
        self.parts.write(_JOB, json.dumps(facts).encode())

    def write(self, table: Table) -> None:
        """Write the file: it is there whole or not at all."""
        self.place.make()
        FORMATS[self.suffix].write(table, self.place, self.name)

    def remove_parts(self) -> None:
        """They are not needed any more."""
        self.place.remove_folder(f"{self.name}.parts")


def target_of(out: str, suffixes: Sequence[str], access: Access) -> Target:
    """The file that ``--out`` names.

    Args:
        out: a path or URL.
        suffixes: those that there are for the command.

    Raises:
        ConfigError: it has another suffix, is a folder, or what writes it is not installed.
    """
    folder, slash, name = out.rpartition("/")
    suffix = next((each for each in suffixes if name.lower().endswith(each)), None)
    if suffix is None or name == suffix:
        raise ConfigError("--out", out, f"a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    place = open_place(folder or slash or ".", access, "--out")
    if place.is_local and (place.path / name).is_dir():
        raise ConfigError("--out", out, "a file (this is a folder)")
    FORMATS[suffix].check()
    return Target(place, name, suffix)
