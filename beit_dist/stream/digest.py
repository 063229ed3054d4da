"""One number for what a step is made of: which samples in which order, how they are masked, which branches drop.

Whoever doubts that a run which was killed, or went on with other ranks, has seen the same data as one that was
not can compare these numbers, one for each step in ``metrics.jsonl``. They show mistakes, not malice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_Words = NDArray[np.uint64]


def rows_digest(first_row: int, *columns: NDArray[np.signedinteger | np.unsignedinteger]) -> int:
    """A 64-bit number of consecutive rows of a global batch, such that those of all ranks add up (mod 2⁶⁴).

    Each row's values are multiplied by words that belong to their columns and added up; the sum is mixed with the
    row's number. So the result does not depend on how rows are divided over ranks, but on each row's place.

    Args:
        first_row: the first row's number in the global batch.
        columns: integers (R, ...); all of a row's values count, in order.
    """
    rows = len(columns[0])
    hashed: _Words = np.zeros(rows, dtype=np.uint64)
    first_word = 0
    for column in columns:
        values = column.reshape(rows, -1)
        own = _mixed(np.arange(first_word, first_word + values.shape[1], dtype=np.uint64)) | np.uint64(1)
        hashed += (values.astype(np.uint64) * own).sum(axis=1, dtype=np.uint64)
        first_word += values.shape[1]
    places = _mixed(np.arange(first_row, first_row + rows, dtype=np.uint64))
    return int(_mixed(hashed ^ places).sum(dtype=np.uint64))


def _mixed(values: _Words) -> _Words:
    """SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014)."""
    values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)), dtype=np.uint64)
