"""Folders of images whose classes can be told apart by their colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"amber": (220, 170, 40), "blue": (40, 60, 210), "green": (40, 180, 70)}


def write_classes(folder: Path, counts: Sequence[int] = (14, 12, 10), side: int = 20, seed: int = 0) -> Path:
    """So many noisy PNGs of each of three classes."""
    random = np.random.default_rng(seed)
    for (name, colour), count in zip(COLOURS.items(), counts, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noisy = random.normal(colour, 60, (side, side, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{number:03d}.png")
    return folder
