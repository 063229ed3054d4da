"""What every way to mask has in common: a mask is a function of (seed, epoch, sample id) and nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from beit_dist.config.masking import MaskingConfig
from beit_dist.config.reading import exact
from beit_dist.draws import Integers
from beit_dist.errors import ConfigError

Bools = NDArray[np.bool_]
Int16s = NDArray[np.int16]


class Masks(ABC):
    """Masks for one grid and seed. A mode is a subclass and a line in ``modes.py``.

    Args:
        masking: the mode's settings; those that it does not use are ignored.
        grid: side of a square grid in patches, or (height, width).
        seed: of the run.

    Raises:
        ConfigError: there can be no such masks.
    """

    positions_per_image: int
    """K, the length of every row of positions: the most patches that this mode masks. Set by the subclass."""

    def __init__(self, masking: MaskingConfig, grid: int | tuple[int, int], seed: int) -> None:
        self.height, self.width = (grid, grid) if isinstance(grid, int) else grid
        self.patches = self.height * self.width
        self.seed = seed

    @abstractmethod
    def masked(self, epochs: Integers, sample_ids: Integers) -> Bools:
        """Which patches are masked in each of n samples.

        A sample's mask does not depend on the others that are asked for with it.

        Args:
            epochs: (n,).
            sample_ids: (n,).

        Returns:
            (n, patches), row-major; 1 to K of a row are true.
        """

    @abstractmethod
    def describe(self) -> str:
        """How many patches it masks, and which, for ``--dry-run``."""

    @classmethod
    @abstractmethod
    def uses(cls, masking: MaskingConfig) -> set[str]:
        """Which of the settings in ``masking`` matter to this mode."""

    def positions_of(self, epochs: Integers | Sequence[int], sample_ids: Integers | Sequence[int]) -> Int16s:
        """:meth:`masked` as indices, ascending: (n, K) int16, padded at the end with -1. No row is empty."""
        masked = self.masked(np.asarray(epochs), np.asarray(sample_ids))
        rows = np.full((len(masked), self.positions_per_image), -1, np.int16)
        filled = np.arange(self.positions_per_image) < numbers_of(masked)[:, None]
        # On flat arrays, which NumPy takes from six times as fast as from two-dimensional ones.
        patches = np.broadcast_to(np.arange(self.patches, dtype=np.int16), masked.shape)
        rows[filled] = np.compress(masked.reshape(-1), patches.reshape(-1))
        return np.asarray(rows, dtype=np.int16)

    def positions(self, epoch: int, sample_id: int) -> Int16s:
        """Those of one sample: (K,)."""
        row: Int16s = self.positions_of([epoch], [sample_id])[0]
        return row


def numbers_of(masked: Bools) -> Int16s:
    """How many are true in each row of (n, m)."""
    return np.asarray(masked.sum(axis=1, dtype=np.int16), dtype=np.int16)


def smallest(words: NDArray[np.uint64], numbers: int | Integers) -> Bools:
    """Where the smallest words of each row are; of equal ones, the first.

    Args:
        words: (n, m).
        numbers: how many, 1 to m: for all rows, or (n,).

    Returns:
        (n, m).
    """
    numbers = np.broadcast_to(np.asarray(numbers), len(words))
    last = np.sort(words, axis=1)[np.arange(len(words)), numbers - 1]
    chosen = words <= last[:, None]
    for row in np.flatnonzero(numbers_of(chosen) != numbers):  # equal words: about one row in 10¹⁵
        chosen[row, np.argsort(words[row], kind="stable")[numbers[row] :]] = False
    return chosen


def budget_of(masking: MaskingConfig, patches: int) -> int:
    """``masked_patches``, or ceil(ratio · patches) with the ratio as it was written.

    Raises:
        ConfigError: nothing would be left to see.
    """
    budget = masking.masked_patches or math.ceil(exact(masking.ratio) * patches)
    if budget >= patches:
        field = "masking.masked_patches" if masking.masked_patches else "masking.ratio"
        raise ConfigError(field, budget, f"fewer masked patches than the {patches} patches of an image")
    return budget


def budget_settings(masking: MaskingConfig) -> set[str]:
    """The settings that :func:`budget_of` looks at."""
    return {"masked_patches"} if masking.masked_patches else {"masked_patches", "ratio"}
