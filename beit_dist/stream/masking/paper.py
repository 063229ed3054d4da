"""The paper's masks, Algorithm 1 of arXiv 2106.08254: more than ``ratio`` of the patches, often by several."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from beit_dist.config.masking import MaskingConfig
from beit_dist.config.reading import exact
from beit_dist.errors import ConfigError
from beit_dist.stream.masking.blocks import MIN_ASPECT, BlockMasks


class PaperMasks(BlockMasks):
    """Blocks until more than ``ratio`` of the patches is masked."""

    spans_grid = True  # Algorithm 1 only wants blocks to fit
    patience = 0
    first_tries = 12  # one mask in a thousand needs more

    def __init__(self, masking: MaskingConfig, grid: int | tuple[int, int], seed: int) -> None:
        super().__init__(masking, grid, seed)
        self.threshold = masking.ratio * self.patches
        self.too_few = math.floor(exact(masking.ratio) * self.patches)
        """The largest number of masked patches that is not more than the ratio. The binary threshold can be a
        little above or below the whole number that was meant; areas do not mind, but the end of the loop does."""
        if self.too_few + 1 >= self.patches:
            expected = f"fewer masked patches than the {self.patches} patches of an image"
            raise ConfigError("masking.ratio", self.too_few + 1, expected)
        self.area_total, self.enough, self.most = self.threshold, self.too_few + 1, self.patches
        self.check_blocks(self.too_few + 1, self.threshold, self.patches)
        self.positions_per_image = self._bound()

    @classmethod
    def uses(cls, masking: MaskingConfig) -> set[str]:
        """The ratio itself, and the smallest block."""
        return {"ratio", "min_block"}

    def describe(self) -> str:
        """Between which numbers."""
        numbers = f"{self.too_few + 1} to {self.positions_per_image} of {self.patches} patches"
        return f"{numbers}, blocks of at least {self.min_block}"

    def aspects(self, units: NDArray[np.float64]) -> NDArray[np.float64]:
        """Uniform."""
        return MIN_ASPECT + (1 / MIN_ASPECT - MIN_ASPECT) * units

    def _bound(self) -> int:
        """The most patches that can be masked.

        Let m be the masked patches before the last block and T = ratio · patches, so m ≤ ⌊T⌋. The last block's
        target area is at most s(m) = max(min_block, T − m), so the mask ends with at most m + A(s(m)) patches,
        where A(s) is the largest rectangle of whole patches that a target area of at most s can be rounded to
        (:func:`smallest_areas`). The bound is the largest m + A(s(m)).
        It is reached whenever the maximum is at an m that blocks can make and the last block can miss them all.
        """
        least = smallest_areas(self.most_height, self.most_width)
        most = 0
        for masked in range(self.too_few + 1):
            target = max(float(self.min_block), self.threshold - masked)
            largest = max((patches for area, patches in least if area <= target), default=0)
            most = max(most, masked + largest)
        return min(most, self.patches)


def smallest_areas(most_height: int, most_width: int) -> list[tuple[float, int]]:
    """For each rectangle that a target area can be rounded to: (the smallest such area, its patches).

    A rectangle h × w comes from real sides x in [h − ½, h + ½] and y in [w − ½, w + ½] whose product is the target
    area, with 0.3 ≤ x/y ≤ 1/0.3. The product is least at the smallest x and y that the aspect allows: h − ½ and
    w − ½, the shorter one raised to 0.3 of the other if need be; if that leaves the cell, nothing rounds to h × w.
    """
    areas = []
    for height in range(1, most_height + 1):
        for width in range(1, most_width + 1):
            x, y = height - 0.5, width - 0.5
            x, y = max(x, MIN_ASPECT * y), max(y, MIN_ASPECT * x)
            if x <= height + 0.5 and y <= width + 0.5:
                areas.append((x * y, height * width))
    return areas
