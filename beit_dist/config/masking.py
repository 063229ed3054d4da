"""How patches are masked."""

from __future__ import annotations

from pydantic import Field

from beit_dist.config.reading import Section


class MaskingConfig(Section):
    """Which patches are masked."""

    mode: str = "exact"
    """How masks are drawn. ``exact``: blocks as the released code draws them, topped up with single patches to
    exactly ``masked_patches``. ``original``: the released code's blocks alone, at most ``masked_patches``.
    ``paper``: Algorithm 1, blocks until more than ``ratio`` is masked. ``random``: exactly ``masked_patches``
    single patches."""
    masked_patches: int = Field(0, ge=0)
    """Patches to mask in an image, in every mode except ``paper``. 0 means ceil(ratio · patches)."""
    ratio: float = Field(0.4, gt=0, lt=1)
    """Share of the patches to mask. Ignored if ``masked_patches`` is set, except in mode ``paper``."""
    min_block: int = Field(16, ge=1)
    """Smallest target area of a block, in patches. Not used by ``random``."""
