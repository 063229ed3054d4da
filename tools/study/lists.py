"""Which images are labelled: CSV files of parts of a folder of class folders, drawn by a seed."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from beit_dist.errors import DataError

_FILES = (".jpg", ".jpeg", ".png")
Labelled = tuple[Path, str]


def write_lists(train: Path, test: Path, out: Path, shares: Iterable[int], seeds: Sequence[int]) -> None:
    """Write ``test.csv``, ``train-100.csv``, ``train-SHARE-SEED.csv`` with that per cent of each class.

    To choose settings by, there are also ``fit-...`` and ``choose``: nine tenths and one tenth of ``train``.

    Args:
        train: folder of class folders; so is ``test``.
        out: folder of the lists.
        shares: per cent, below 100.
        seeds: of the draws.
    """
    out.mkdir(parents=True, exist_ok=True)
    images = _images(train)
    _write(out / "test.csv", _images(test))
    _write(out / "train-100.csv", images)
    for seed in seeds:
        for share in shares:
            _write(out / f"train-{share}-{seed}.csv", part(images, share / 100, seed)[0])
    chosen, rest = part(images, 0.1, 10_000)
    _write(out / "choose.csv", chosen)
    _write(out / "fit-100.csv", rest)
    for share in shares:
        _write(out / f"fit-{share}.csv", part(rest, share / 100, 0)[0])


def part(images: Sequence[Labelled], share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """A share of the images of each class, at least one; and the others."""
    random, taken, rest = np.random.default_rng(seed), [], []
    for label in sorted({label for _, label in images}):
        of_class = [image for image in images if image[1] == label]
        order = random.permutation(len(of_class))
        number = max(1, round(share * len(of_class)))
        taken += [of_class[place] for place in sorted(order[:number])]
        rest += [of_class[place] for place in sorted(order[number:])]
    return taken, rest


def _images(folder: Path) -> list[Labelled]:
    found = [(path, path.parent.name) for path in sorted(folder.glob("*/*")) if path.suffix.lower() in _FILES]
    if not found:
        raise DataError(f"{folder}: no images in class folders. Name the folder in which they are with --data")
    return found


def _write(out: Path, images: Iterable[Labelled]) -> None:
    rows = [("path", "label"), *((os.path.relpath(path, out.parent), label) for path, label in images)]
    partial = out.with_suffix(".part")
    with partial.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    partial.replace(out)
