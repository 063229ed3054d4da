"""The released code's masks (unilm ``masking_generator.py``): ``original`` as they are, ``exact`` topped up.

``original`` masks at most its budget; about a third of its masks have fewer patches. ``exact`` adds single
patches up to the budget, so that every image is the same work.
"""

from __future__ import annotations

import math

import numpy as np

from beit_dist.config.masking import MaskingConfig
from beit_dist.draws import Purpose, words
from beit_dist.stream.masking.base import budget_of, budget_settings
from beit_dist.stream.masking.blocks import MIN_ASPECT, UNIT, BlockMasks

TRIES_PER_BLOCK = 10
"""Draws after which one more block is no longer looked for (unilm)."""


class OriginalMasks(BlockMasks):
    """Blocks, while they fit into what is left of the budget."""

    spans_grid = False  # the released code wants rectangles strictly inside

    def __init__(self, masking: MaskingConfig, grid: int | tuple[int, int], seed: int) -> None:
        super().__init__(masking, grid, seed)
        self.budget = self.positions_per_image = budget_of(masking, self.patches)
        self.check_blocks(self.budget, self.budget, self.budget)

    @classmethod
    def uses(cls, masking: MaskingConfig) -> set[str]:
        """The budget, and the smallest block."""
        return budget_settings(masking) | {"min_block"}

    def describe(self) -> str:
        """The budget is a bound."""
        return f"at most {self.budget} of {self.patches} patches, blocks of at least {self.min_block}"

    def mask(self, epoch: int, sample_id: int) -> int:
        """The released code's loop."""
        sqrt, exp, smallest = math.sqrt, math.exp, self.min_block
        log_aspect = math.log(1 / MIN_ASPECT)
        lowest, spread = -log_aspect, 2 * log_aspect * UNIT
        mask, left, tries = 0, self.budget, TRIES_PER_BLOCK
        for area_word, aspect_word, top_word, left_word in self.tries(epoch, sample_id):
            # As random.uniform does: when less is left than min_block, the bounds are simply reversed.
            area = smallest + (left - smallest) * ((area_word >> 11) * UNIT)
            aspect = exp(lowest + spread * (aspect_word >> 11))
            height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if height <= self.most_height and width <= self.most_width:
                block = self.place(height, width, top_word, left_word)
                gain = (block & ~mask).bit_count()
                if 0 < gain <= left:
                    mask |= block
                    left -= gain
                    if not left:
                        break
                    tries = TRIES_PER_BLOCK
                    continue
            tries -= 1
            if not tries:
                if mask:  # the released code gives up here even with nothing masked
                    break
                tries = TRIES_PER_BLOCK
        return mask


class ExactMasks(OriginalMasks):
    """The same blocks, then single patches up to exactly the budget."""

    def describe(self) -> str:
        """The budget is met."""
        return f"{self.budget} of {self.patches} patches, blocks of at least {self.min_block}"

    def mask(self, epoch: int, sample_id: int) -> int:
        """Adds the unmasked patches with the smallest words until the budget is reached."""
        mask = super().mask(epoch, sample_id)
        missing = self.budget - mask.bit_count()
        if missing:
            keys = words(self.seed, Purpose.MASK_TOP_UP, (epoch, sample_id), self.patches)
            for patch in np.argsort(keys, kind="stable").tolist():
                if not mask >> patch & 1:
                    mask |= 1 << patch
                    missing -= 1
                    if not missing:
                        break
        return mask
