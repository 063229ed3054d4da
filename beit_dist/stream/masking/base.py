"""What every way to mask has in common: a mask is a function of (seed, epoch, sample id) and nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from beit_dist.config.masking import MaskingConfig
from beit_dist.config.reading import exact
from beit_dist.errors import ConfigError

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
    def masked(self, epoch: int, sample_id: int) -> NDArray[np.integer]:
        """The masked patches of a sample in an epoch: 1 to K row-major indices, ascending."""

    @abstractmethod
    def describe(self) -> str:
        """How many patches it masks, and which, for ``--dry-run``."""

    @classmethod
    @abstractmethod
    def uses(cls, masking: MaskingConfig) -> set[str]:
        """Which of the settings in ``masking`` matter to this mode."""

    def positions(self, epoch: int, sample_id: int) -> Int16s:
        """:meth:`masked` as (K,) int16, padded at the end with -1. Never empty."""
        chosen = self.masked(epoch, sample_id)
        row = np.full(self.positions_per_image, -1, np.int16)
        row[: len(chosen)] = chosen
        return row


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
