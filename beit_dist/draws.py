"""Keyed random numbers: every draw is a pure function of (seed, purpose, key), never of what was drawn before.

The words are those of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
whose stream NumPy guarantees for its bit generators. Only raw words are used: NumPy does not promise to keep
what ``Generator.permutation`` or ``Generator.random`` make of them (NEP 19), so those steps are ours.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_MASK64 = (1 << 64) - 1
_kept = threading.local()


class Purpose(IntEnum):
    """What a draw is for. Part of the key, so that draws of different purposes are independent.

    The numbers are part of the format: changing one changes every run and every data set.
    """

    SOURCE_ORDER = 1
    CROP = 2
    FLIP = 3
    JITTER = 4
    BLOCK_ORDER = 5
    WINDOW_ORDER = 6
    MASK = 7
    MASK_TOP_UP = 8
    DROP_PATH = 9
    CORPUS = 10
    INIT = 11
    TOKENIZER_ORDER = 12
    TOKENIZER_NOISE = 13
    RANDOM_MASK = 14
    LABELLED_ORDER = 15
    LABELLED_VIEW = 16
    AUGMENTATION = 17
    ERASING = 18
    MIXING = 19
    HEAD_DROPOUT = 20
    PROBE_SPLIT = 21


def words(seed: int, purpose: Purpose, key: tuple[int, ...], count: int) -> Words:
    """``count`` uniform 64-bit words for up to three integers of ``key``; each in [0, 2**64)."""
    if len(key) > 3:
        raise ValueError(f"a key has at most 3 integers, got {key}")
    drawer, state = _drawer()
    # The lowest word of the counter counts blocks of four words within the draw.
    state["state"]["counter"][:] = [0, *(part & _MASK64 for part in key), *(0,) * (3 - len(key))]
    state["state"]["key"][:] = seed & _MASK64, int(purpose)
    drawer.state = state
    return np.asarray(drawer.random_raw(count), dtype=np.uint64)


def _drawer() -> tuple[np.random.Philox, Any]:
    """This thread's generator and a state with nothing buffered: setting it is 4× faster than a new generator."""
    if not hasattr(_kept, "drawer"):
        _kept.drawer = np.random.Philox(0)
        _kept.state = _kept.drawer.state
    return _kept.drawer, _kept.state


def uniforms(raw: Words) -> NDArray[np.float64]:
    """Words to float64 in [0, 1), from their upper 53 bits."""
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def permutation(seed: int, purpose: Purpose, key: tuple[int, ...], length: int) -> NDArray[np.int64]:
    """A permutation of ``range(length)``: the stable sorting order of ``length`` words."""
    return np.argsort(words(seed, purpose, key, length), kind="stable").astype(np.int64, copy=False)


def below(word: int, bound: int) -> int:
    """An integer in [0, bound) from one 64-bit word by multiplication (bias below bound / 2**64)."""
    return (word * bound) >> 64
