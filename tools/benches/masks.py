"""Masks: microseconds for one, with its draws, in each mode."""

from __future__ import annotations

from beit_dist.config import MaskingConfig
from beit_dist.data.masking import MaskGenerator
from benches.measuring import Row, in_turn, row


def measure(quick: bool) -> list[Row]:
    """A 14×14 grid at the released settings (75 patches, blocks of at least 16)."""
    count = 300 if quick else 3000
    modes = ("exact", "original", "paper")
    generators = {m: MaskGenerator(14, MaskingConfig(mode=m, masked_patches=75), seed=0) for m in modes}
    work = {m: (lambda g=g: [g.positions(0, i) for i in range(count)]) for m, g in generators.items()}
    taken = in_turn(work, 3 if quick else 7)
    return [row("masks", mode, "ours", [1e6 * t / count for t in taken[mode]], "us/mask") for mode in modes]
