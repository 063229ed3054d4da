"""What a layer makes of images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from beit_dist.probing.features import pooled


@dataclass(frozen=True)
class Features:
    """One layer's output of B images, C being the model's width.

    Gradients flow through all of it. What is computed from ``tokens`` is fp32.
    """

    layer: int
    """1: the first block."""
    tokens: Tensor
    """(B, 1 + height · width, C): the class token first, then the patches row by row; in the model's dtype."""

    @property
    def class_token(self) -> Tensor:
        """(B, C)"""
        return self.tokens[:, 0].float()

    @property
    def patch_mean(self) -> Tensor:
        """(B, C): the mean of the patches."""
        return self.pooled[:, self.tokens.shape[2] :]

    @property
    def patch_grid(self) -> Tensor:
        """(B, C, height, width), as convolutions take it."""
        patches = self.tokens[:, 1:].float().transpose(1, 2)
        side = round(patches.shape[2] ** 0.5)
        return patches.reshape(*patches.shape[:2], side, side)

    @property
    def pooled(self) -> Tensor:
        """(B, 2 · C): class token, then mean of the patches; what ``beit probe`` looks at."""
        return pooled(self.tokens)
