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
Integers = NDArray[np.signedinteger]

_MASK64 = (1 << 64) - 1
_32, _LOWER_32 = np.uint64(32), np.uint64((1 << 32) - 1)


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
    _check_parts(len(key))
    kept = _kept.of(seed, purpose)
    for place in range(1, 4):
        kept.counter[place] = key[place - 1] & _MASK64 if place <= len(key) else 0
    kept.philox.state = kept.state
    return np.asarray(kept.philox.random_raw(count), dtype=np.uint64)


def words_of(seed: int, purpose: Purpose, keys: tuple[Integers, ...], count: int) -> Words:
    """:func:`words` of many keys at once.

    Args:
        seed: of the run.
        purpose: of the draws.
        keys: one to three columns of n integers; key i is made of the i-th of each.
        count: words of each key.

    Returns:
        (n, count).
    """
    _check_parts(len(keys))
    columns = [column.astype(np.int64).view(np.uint64).tolist() for column in keys]
    columns += [[0] * len(columns[0])] * (3 - len(columns))
    kept, drawn = _kept.of(seed, purpose), []
    philox, state, counter = kept.philox, kept.state, kept.counter
    for counter[1], counter[2], counter[3] in zip(*columns, strict=True):
        philox.state = state
        drawn.append(philox.random_raw(count))
    return np.concatenate(drawn).reshape(-1, count) if drawn else np.empty((0, count), np.uint64)


class _Kept(threading.local):
    """This thread's generator, and the state to set before a draw: 10× faster than a new generator.

    The state has nothing buffered. Its integers are in lists, as each costs more to take out of an array.
    """

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.counter = [0, 0, 0, 0]
        """The key in the upper three words. The lowest one counts blocks of four words within a draw."""
        self._key = [0, 0]
        numbers = {"counter": self.counter, "key": self._key}
        self.state: Any = {**self.philox.state, "state": numbers, "buffer": [0, 0, 0, 0]}

    def of(self, seed: int, purpose: Purpose) -> _Kept:
        """This, for draws of a seed and purpose."""
        self._key[:] = seed & _MASK64, int(purpose)
        return self


_kept = _Kept()


def _check_parts(parts: int) -> None:
    if parts > 3:
        raise ValueError(f"a key has at most 3 integers, got {parts}")


def uniforms(raw: Words) -> NDArray[np.float64]:
    """Words to float64 in [0, 1), from their upper 53 bits."""
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def permutation(seed: int, purpose: Purpose, key: tuple[int, ...], length: int) -> NDArray[np.int64]:
    """A permutation of ``range(length)``: the stable sorting order of ``length`` words."""
    return np.argsort(words(seed, purpose, key, length), kind="stable").astype(np.int64, copy=False)


def below(word: int, bound: int) -> int:
    """An integer in [0, bound) from one 64-bit word by multiplication (bias below bound / 2**64)."""
    return (word * bound) >> 64


def below_each(raw: Words, bounds: Words) -> Words:
    """:func:`below` of each word and its bound, which must be less than 2**32; of one shape."""
    upper, lower = raw >> _32, raw & _LOWER_32
    upper *= bounds
    lower *= bounds
    lower >>= _32
    upper += lower
    upper >>= _32
    return np.asarray(upper, dtype=np.uint64)
