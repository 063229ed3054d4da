"""Masks: microseconds for one, with its draws, in each mode and beside a plain generator.

The plain generator draws one mask after another with Python's ``random`` into a NumPy array, as the released code
does (unilm ``masking_generator.py``).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from beit_dist.benches.measuring import Row, in_turn, row
from beit_dist.config.masking import MaskingConfig
from beit_dist.stream.masking.base import Masks
from beit_dist.stream.masking.modes import MODES, masks_of

_GRID, _PATCHES, _MIN_BLOCK = 14, 75, 16  # the released settings
_RATIO = 0.4  # of the paper's Algorithm 1
_BATCHES = (8, 128, 1024)


def measure(quick: bool) -> list[Row]:
    """A 14×14 grid at the released settings: processor time, ours and the plain generator in turn."""
    count, repetitions = (1024, 3) if quick else (4096, 9)
    # A process that has freed so much keeps what it frees later, as a loader's does; a fresh one gives it back.
    np.ones(4 << 20, np.uint8)
    rows = []
    for mode in MODES:
        masks = masks_of(MaskingConfig(mode=mode, masked_patches=_PATCHES), _GRID, seed=0)
        for batch in _BATCHES:
            work = {"ours": partial(_draw, masks, batch, count), "plain": partial(_draw_plain, PLAIN[mode], count)}
            taken = in_turn(work, repetitions, clock=time.process_time)
            case = f"{mode}, batch {batch:,}"
            rows += [row("masks", case, who, [1e6 * t / count for t in taken[who]], "us/mask") for who in work]
            ratios = [plain / ours for ours, plain in zip(taken["ours"], taken["plain"], strict=True)]
            rows.append(row("masks", case, "plain / ours", ratios, "x"))
    return rows


def _draw(masks: Masks, batch: int, count: int) -> None:
    for first in range(0, count, batch):
        masks.positions_of(np.zeros(batch, np.int32), np.arange(first, first + batch))


def _draw_plain(draw: Callable[[], NDArray[np.int64]], count: int) -> None:
    for _ in range(count):
        draw()


def _add_block(mask: NDArray[np.int64], most: int) -> int:
    """Try ten times to mask 1 to ``most`` more patches by a block; how many it were."""
    for _ in range(10):
        area = random.uniform(_MIN_BLOCK, most)
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < _GRID and width < _GRID:
            top, left = random.randint(0, _GRID - height), random.randint(0, _GRID - width)
            place = mask[top : top + height, left : left + width]
            if 0 < height * width - place.sum() <= most:
                return _fill(place)
    return 0


def _fill(place: NDArray[np.int64]) -> int:
    """Mask a place patch by patch, as the released code does; how many more they are."""
    gain = 0
    for y in range(place.shape[0]):
        for x in range(place.shape[1]):
            if not place[y, x]:
                place[y, x] = 1
                gain += 1
    return gain


def _original() -> NDArray[np.int64]:
    mask = np.zeros((_GRID, _GRID), np.int64)
    left = _PATCHES
    while left and (gain := _add_block(mask, left)):
        left -= gain
    return mask


def _exact() -> NDArray[np.int64]:
    mask = _original()
    missing = _PATCHES - int(mask.sum())
    if missing:
        mask.reshape(-1)[random.sample(np.flatnonzero(mask == 0).tolist(), missing)] = 1
    return mask


def _paper() -> NDArray[np.int64]:
    mask = np.zeros((_GRID, _GRID), np.int64)
    masked = 0
    while masked <= _RATIO * _GRID**2:
        area = random.uniform(_MIN_BLOCK, _RATIO * _GRID**2 - masked)
        aspect = random.uniform(0.3, 1 / 0.3)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height <= _GRID and width <= _GRID:
            top, left = random.randint(0, _GRID - height), random.randint(0, _GRID - width)
            masked += _fill(mask[top : top + height, left : left + width])
    return mask


def _random() -> NDArray[np.int64]:
    mask = np.zeros((_GRID, _GRID), np.int64)
    mask.reshape(-1)[random.sample(range(_GRID**2), _PATCHES)] = 1
    return mask


PLAIN: dict[str, Callable[[], NDArray[np.int64]]] = {
    "exact": _exact,
    "original": _original,
    "paper": _paper,
    "random": _random,
}
"""A plain generator for each mode: (14, 14) of 0 and 1."""
