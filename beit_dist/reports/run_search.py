"""Finds the runs, and the data sets in the making, in a folder: by the names in it, without opening a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from beit_dist.storage.place import Place

_FILES = re.compile(
    r"\.(tar|zip|parquet|json|jsonl|ya?ml|safetensors|bin|pt|pth|pkl|npz|npy|txt|md|log|png|jpe?g|webp|py|gz)$",
    re.I,
)
"""Names that no store is asked whether they are folders: each answer takes a request."""


@dataclass(frozen=True)
class Found:
    """A folder that is of interest."""

    place: Place
    below: tuple[str, ...]
    """The way to it from the folder that was searched; empty for this folder itself."""
    is_run: bool
    """Else, it is a data set that ``beit shards`` has made or begun."""


def find_runs(folder: Place, depth: int, refused: list[str]) -> Iterator[Found]:
    """The runs in a folder, itself included, and so many levels below; nothing is looked for inside of a run.

    Args:
        refused: takes what cannot be listed, with the reason.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    seen: set[str] = set()
    level: list[tuple[Place, tuple[str, ...]]] = [(folder, ())]
    for _ in range(depth + 1):
        below: list[tuple[Place, tuple[str, ...]]] = []
        for place, path in level:
            if place.is_local and (real := os.path.realpath(place.path)) in seen:
                continue  # a link to what was found by its own name, or around it
            seen |= {real} if place.is_local else set()
            try:
                names = place.list()
                is_run = _is_run(place, names)
                subfolders = [] if is_run or "job.json" in names else _folders(place, names)
            except OSError as error:
                if not path:
                    raise
                refused.append(f"{place}: {error.strerror or error}")
                continue
            if is_run or {"job.json", "sources.jsonl"} <= set(names):
                yield Found(place, path, is_run)
            below += [(place / name, (*path, name)) for name in subfolders]
        level = below


def _is_run(place: Place, names: list[str]) -> bool:
    """Whether a start has made it its own: it takes a number before it writes anything else."""
    return "run.json" in names or ("checkpoints" in names and bool(place.list("checkpoints/attempts")))


def _folders(place: Place, names: list[str]) -> list[str]:
    shown = [name for name in names if not name.startswith(".")]
    if not place.is_local:
        return [name for name in shown if not _FILES.search(name)]
    with os.scandir(place.path) as entries:
        folders = {entry.name for entry in entries if entry.is_dir()}
    return [name for name in shown if name in folders]
