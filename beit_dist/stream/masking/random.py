"""Random masks: single patches anywhere, as in the paper's ablation (arXiv 2106.08254)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from beit_dist.config.masking import MaskingConfig
from beit_dist.draws import Purpose, permutation
from beit_dist.stream.masking.base import Masks, budget_of, budget_settings


class RandomMasks(Masks):
    """Exactly the budget, each set of so many patches as likely as any other."""

    def __init__(self, masking: MaskingConfig, grid: int | tuple[int, int], seed: int) -> None:
        super().__init__(masking, grid, seed)
        self.budget = self.positions_per_image = budget_of(masking, self.patches)

    @classmethod
    def uses(cls, masking: MaskingConfig) -> set[str]:
        """The budget."""
        return budget_settings(masking)

    def describe(self) -> str:
        """No blocks."""
        return f"{self.budget} of {self.patches} patches, drawn one by one"

    def masked(self, epoch: int, sample_id: int) -> NDArray[np.integer]:
        """The first patches of a permutation."""
        order = permutation(self.seed, Purpose.RANDOM_MASK, (epoch, sample_id), self.patches)
        return np.sort(order[: self.budget])
