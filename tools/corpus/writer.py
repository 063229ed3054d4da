"""Writes a corpus of generated pictures: ``images/<class>/``, ``labels/<class>/`` and ``classes.json``."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from beit_dist.errors import ConfigError, DataError
from corpus.scene import LABELS, draw_scene
from corpus.things import THINGS

CLASSES = tuple(THINGS)
CORPUS_VERSION = 2
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
    if workers < 0:
        raise ConfigError("--workers", workers, "0 or more")
    root = Path(out)
    about = {"version": CORPUS_VERSION, "images": images, "size": size, "seed": seed}
    text = json.dumps(about | {"classes": CLASSES, "labels": LABELS}, indent=1) + "\n"
    try:
        if root.exists() and _is_there(root, text):
            return False
        for name in CLASSES:
            for kind in ("images", "labels"):
                (root / kind / name).mkdir(parents=True, exist_ok=True)
        processes = min(workers or len(os.sched_getaffinity(0)), images // _FEW + 1)
        # Not fork: the caller may hold threads (tqdm's, PyTorch's).
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            write = partial(_write_one, root, seed, size)
            done = pool.map(write, range(images), chunksize=16) if processes > 1 else map(write, range(images))
            for _ in tqdm(done, total=images, desc="corpus", unit="img", disable=None):
                pass
        temporary = root / ".classes.json.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(root / "classes.json")
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be written ({error.strerror}).") from None
    return True


def picture_path(root: str | Path, kind: str, picture: int) -> Path:
    """The file of a picture (``kind`` images, JPEG) or of its label map (``kind`` labels, PNG)."""
    suffix = "jpg" if kind == "images" else "png"
    return Path(root) / kind / CLASSES[picture % len(CLASSES)] / f"{picture:06d}.{suffix}"


def _write_one(root: Path, seed: int, size: int, picture: int) -> None:
    image, labels = draw_scene(seed, picture, CLASSES[picture % len(CLASSES)], size)
    image.save(picture_path(root, "images", picture), quality=93, subsampling=0)
    labels.save(picture_path(root, "labels", picture), compress_level=3)


def _is_there(root: Path, text: str) -> bool:
    """Whether this corpus is whole; raises DataError if the folder holds anything but a part of it."""
    if not root.is_dir():
        raise DataError(f"{root}: got a file, expected a folder or a new name. Choose another --out.")
    listing = root / "classes.json"
    if listing.exists():
        if listing.read_text(encoding="utf-8") == text:
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
