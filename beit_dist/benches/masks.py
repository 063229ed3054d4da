"""Masks: microseconds for one, with its draws, in each mode."""

from __future__ import annotations

from functools import partial

from beit_dist.benches.measuring import Row, in_turn, row
from beit_dist.config.masking import MaskingConfig
from beit_dist.stream.masking.modes import MODES, masks_of


def measure(quick: bool) -> list[Row]:
    """A 14×14 grid at the released settings (75 patches, blocks of at least 16)."""
    count = 300 if quick else 3000
    masks = {mode: masks_of(MaskingConfig(mode=mode, masked_patches=75), 14, seed=0) for mode in MODES}

    def draw(mode: str) -> None:
        for sample in range(count):
            masks[mode].positions(0, sample)

    work = {mode: partial(draw, mode) for mode in MODES}
    taken = in_turn(work, 3 if quick else 7)
    return [row("masks", mode, "ours", [1e6 * t / count for t in taken[mode]], "us/mask") for mode in MODES]
