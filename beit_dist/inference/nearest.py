"""The rows that are most similar to some: by the cosine of their features, from blocks of any number of rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DUPLICATE = 0.999
"""Cosine above which two images are most likely one, in another file or size."""


class Neighbour(NamedTuple):
    """A row, and how similar it is."""

    row: int
    cosine: float

    @property
    def is_duplicate(self) -> bool:
        """Whether it is most likely the same image."""
        return self.cosine > DUPLICATE


def nearest(
    queries: NDArray[np.float32], blocks: Iterable[NDArray[np.float32]], top: int
) -> list[list[Neighbour]]:
    """For each query the ``top`` rows most similar to it, the most similar first; of equals the earlier row.

    Args:
        queries: (Q, D).
        blocks: (n, D) each, of rows that are numbered from 0.
        top: how many are found, where there are as many rows.
    """
    queries = _unit(queries)
    cosines = np.zeros((len(queries), 0), np.float32)
    rows = np.zeros((len(queries), 0), np.int64)
    start = 0
    for block in blocks:
        own = np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))
        cosines = np.concatenate([cosines, queries @ _unit(block).T], 1)
        rows = np.concatenate([rows, own], 1)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
        cosines, rows = np.take_along_axis(cosines, best, 1), np.take_along_axis(rows, best, 1)
        start += len(block)
    return [
        [Neighbour(row, cosine) for row, cosine in zip(own_rows, own_cosines, strict=True)]
        for own_rows, own_cosines in zip(rows.tolist(), cosines.tolist(), strict=True)
    ]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = vectors.astype(np.float64)
    unit: NDArray[np.float32] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return unit.astype(np.float32)
