"""Keyed random numbers: every draw is a pure function of (seed, purpose, key), never of what was drawn before.

The words are those of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
whose stream NumPy guarantees for its bit generators. Only raw words are used: NumPy does not promise to keep
what ``Generator.permutation`` or ``Generator.random`` make of them (NEP 19), so those steps are ours.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_MASK64 = (1 << 64) - 1


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


def words(seed: int, purpose: Purpose, key: tuple[int, ...], count: int) -> Words:
    """``count`` uniform 64-bit words for up to three integers of ``key``; each in [0, 2**64)."""
    if len(key) > 3:
        raise ValueError(f"a key has at most 3 integers, got {key}")
    counter = np.zeros(4, np.uint64)  # the lowest word counts blocks of four words within the draw
    counter[1 : 1 + len(key)] = [part & _MASK64 for part in key]
    generator = np.random.Philox(counter=counter, key=np.array([seed & _MASK64, int(purpose)], np.uint64))
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def uniforms(raw: Words) -> NDArray[np.float64]:
    """Words to float64 in [0, 1), from their upper 53 bits."""
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def permutation(seed: int, purpose: Purpose, key: tuple[int, ...], length: int) -> NDArray[np.int64]:
    """A permutation of ``range(length)``: the stable sorting order of ``length`` words."""
    return np.argsort(words(seed, purpose, key, length), kind="stable").astype(np.int64, copy=False)


def below(word: int, bound: int) -> int:
    """An integer in [0, bound) from one 64-bit word by multiplication (bias below bound / 2**64)."""
    return (word * bound) >> 64
