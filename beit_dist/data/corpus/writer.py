"""Writes a corpus of generated pictures: ``images/<class>/``, ``labels/<class>/`` and ``classes.json``."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from beit_dist.data.corpus.scene import LABELS, draw_scene
from beit_dist.data.corpus.things import THINGS
from beit_dist.errors import ConfigError, DataError

CLASSES = tuple(THINGS)
CORPUS_VERSION = 1
"""Raised when the same seed draws other pictures."""
SMALLEST, LARGEST = 16, 2048

_FEW = 64
"""Below this many pictures starting processes takes longer than it saves."""


def write_corpus(out: str | Path, images: int, size: int = 128, seed: int = 0, workers: int = 0) -> bool:
    """Write ``images`` pictures of ``size`` × ``size`` pixels under ``out``.

    Picture i is of class i mod 10 and depends on (seed, i, size) only: a larger corpus begins with the
    smaller one. ``classes.json`` is written last; a folder that was left unfinished is completed.

    Args:
        workers: processes; 0 takes one for each CPU this process may use.

    Returns:
        False if the very same corpus was there already.

    Raises:
        ConfigError: a number is out of range.
        DataError: the folder holds something else, or cannot be written.
    """
    if images < 1:
        raise ConfigError("--images", images, "at least 1")
    if not SMALLEST <= size <= LARGEST:
        raise ConfigError("--size", size, f"{SMALLEST} to {LARGEST} pixels")
    if not 0 <= seed < 2**63:
        raise ConfigError("--seed", seed, "0 to 2**63 - 1")
    root = Path(out)
    about = {
        "version": CORPUS_VERSION,
        "images": images,
        "size": size,
        "seed": seed,
        "classes": list(CLASSES),
        "labels": list(LABELS),
    }
    try:
        if _is_there(root, about):
            return False
        for name in CLASSES:
            for kind in ("images", "labels"):
                (root / kind / name).mkdir(parents=True, exist_ok=True)
        with _mapper(images, workers) as mapper:
            tasks = ((str(root), seed, picture, size) for picture in range(images))
            for _ in tqdm(mapper(tasks), total=images, desc="corpus", unit="img", disable=None):
                pass
        _commit(root / "classes.json", about)
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be written ({error.strerror}).") from None
    return True


def picture_path(root: str | Path, kind: str, picture: int) -> Path:
    """The file of a picture (``kind`` images, JPEG) or of its label map (``kind`` labels, PNG)."""
    suffix = "jpg" if kind == "images" else "png"
    return Path(root) / kind / CLASSES[picture % len(CLASSES)] / f"{picture:06d}.{suffix}"


def _write_one(task: tuple[str, int, int, int]) -> None:
    root, seed, picture, size = task
    image, labels = draw_scene(seed, picture, CLASSES[picture % len(CLASSES)], size)
    image.save(picture_path(root, "images", picture), quality=93, subsampling=0)
    labels.save(picture_path(root, "labels", picture), compress_level=3)


def _write_some(tasks: list[tuple[str, int, int, int]]) -> int:
    for task in tasks:
        _write_one(task)
    return len(tasks)


@contextmanager
def _mapper(images: int, workers: int) -> Iterator[Any]:
    """A function that runs the tasks, here or in processes, and yields once for each."""
    count = min(workers or len(os.sched_getaffinity(0)), images // _FEW + 1)
    if count <= 1:
        yield lambda tasks: map(_write_one, tasks)
        return
    # Not fork: the caller may hold threads (tqdm's, PyTorch's).
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))

    def spread(tasks: Iterator[tuple[str, int, int, int]]) -> Iterator[None]:
        chunks = iter(lambda: list(islice(tasks, 16)), [])
        for done in pool.map(_write_some, chunks):
            yield from [None] * done

    try:
        yield spread
    finally:
        pool.shutdown(cancel_futures=True)


def _is_there(root: Path, about: dict[str, Any]) -> bool:
    if not root.exists():
        return False
    if not root.is_dir():
        raise DataError(f"{root}: got a file, expected a folder or a new name. Choose another --out.")
    listing = root / "classes.json"
    if listing.exists():
        if listing.read_text(encoding="utf-8") == _text(about):
            return True
        raise DataError(
            f"{root}: holds another corpus (see {listing}), expected a new or the same one. "
            "Choose another --out, or remove the folder."
        )
    foreign = sorted({entry.name for entry in root.iterdir()} - {"images", "labels", ".classes.json.tmp"})
    if foreign:
        raise DataError(
            f"{root}: got a folder with {foreign[0]!r} in it, expected an empty one. Choose another --out."
        )
    return False


def _commit(path: Path, about: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(_text(about), encoding="utf-8")
    os.replace(temporary, path)


def _text(about: dict[str, Any]) -> str:
    return json.dumps(about, indent=1) + "\n"
