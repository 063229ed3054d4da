"""Random masks: single patches anywhere, as in the paper's ablation (arXiv 2106.08254)."""

from __future__ import annotations

from beit_dist.config.masking import MaskingConfig
from beit_dist.draws import Integers, Purpose, words_of
from beit_dist.stream.masking.base import Bools, Masks, budget_of, budget_settings, smallest


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

    def masked(self, epochs: Integers, sample_ids: Integers) -> Bools:
        """The patches with the smallest words."""
        drawn = words_of(self.seed, Purpose.RANDOM_MASK, (epochs, sample_ids), self.patches)
        return smallest(drawn, self.budget)
