"""The ways to mask, by the name that a recipe calls them: ``masking.mode``."""

from __future__ import annotations

from beit_dist.config.masking import MaskingConfig
from beit_dist.config.reading import entry_of
from beit_dist.stream.masking.base import Masks
from beit_dist.stream.masking.paper import PaperMasks
from beit_dist.stream.masking.random import RandomMasks
from beit_dist.stream.masking.released import ExactMasks, OriginalMasks

MODES: dict[str, type[Masks]] = {
    "exact": ExactMasks,
    "original": OriginalMasks,
    "paper": PaperMasks,
    "random": RandomMasks,
}


def masks_of(masking: MaskingConfig, grid: int | tuple[int, int], seed: int) -> Masks:
    """The masks of a recipe.

    Args:
        masking: its section.
        grid: side of a square grid in patches, or (height, width).
        seed: of the run.

    Raises:
        ConfigError: there is no such mode, or its settings allow no masks on this grid.
    """
    return entry_of("masking.mode", masking.mode, MODES)(masking, grid, seed)
