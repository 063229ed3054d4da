"""The released code's masks (unilm ``masking_generator.py``): ``original`` as they are, ``exact`` topped up.

``original`` masks at most its budget; about a third of its masks have fewer patches. ``exact`` adds single
patches up to the budget, so that every image is the same work.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from beit_dist.config.masking import MaskingConfig
from beit_dist.draws import Integers, Purpose, words_of
from beit_dist.stream.masking.base import Bools, budget_of, budget_settings, numbers_of, smallest
from beit_dist.stream.masking.blocks import MIN_ASPECT, BlockMasks


class OriginalMasks(BlockMasks):
    """Blocks, while they fit into what is left of the budget."""

    spans_grid = False  # the released code wants rectangles strictly inside
    patience = 10  # tries after which it looks for no more blocks (unilm)
    first_tries = 24  # one mask in seventy needs more

    def __init__(self, masking: MaskingConfig, grid: int | tuple[int, int], seed: int) -> None:
        super().__init__(masking, grid, seed)
        self.budget = self.positions_per_image = budget_of(masking, self.patches)
        # As random.uniform does: when less is left than min_block, the bounds of an area are simply reversed.
        self.area_total = self.enough = self.most = self.budget
        self.check_blocks(self.budget, self.budget, self.budget)

    @classmethod
    def uses(cls, masking: MaskingConfig) -> set[str]:
        """The budget, and the smallest block."""
        return budget_settings(masking) | {"min_block"}

    def describe(self) -> str:
        """The budget is a bound."""
        return f"at most {self.budget} of {self.patches} patches, blocks of at least {self.min_block}"

    def aspects(self, units: NDArray[np.float64]) -> NDArray[np.float64]:
        """Uniform in their logarithm.

        NumPy's exponential and the C library's differ in the last bit at times. That moves a side of a block by a
        patch where the side is within 2⁻⁵⁰ of a half: in about one of 10¹³ masks.
        """
        log_aspect = math.log(1 / MIN_ASPECT)
        return np.exp(-log_aspect + 2 * log_aspect * units)


class ExactMasks(OriginalMasks):
    """The same blocks, then single patches up to exactly the budget."""

    def describe(self) -> str:
        """The budget is met."""
        return f"{self.budget} of {self.patches} patches, blocks of at least {self.min_block}"

    def masked(self, epochs: Integers, sample_ids: Integers) -> Bools:
        """Adds the unmasked patches with the smallest words until the budget is reached."""
        masked = super().masked(epochs, sample_ids)
        missing = self.budget - numbers_of(masked)
        rows = np.flatnonzero(missing)
        if len(rows):
            drawn = words_of(self.seed, Purpose.MASK_TOP_UP, (epochs[rows], sample_ids[rows]), self.patches)
            begun = masked[rows]
            drawn |= -begun.astype(np.uint64)  # the largest word where a patch is masked already
            masked[rows] = begun | smallest(drawn, missing[rows])
        return masked
